"""The parts of the study: which arms run in which worlds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from study.plan import Planner, World
from study.settings import (
    COMPARED,
    DPO_CENTRE,
    DPO_SEARCH,
    LABEL_NOISE,
    LENGTHS,
    OPTION_ABLATIONS,
    PPO_CENTRE,
    PPO_SEARCH,
    PPO_SYSTEMS,
    REWARD_ABLATIONS,
    SEARCH_SEED,
    SENTENCE_COEF,
    TUNED_AS,
    WEIGHTS,
    Scale,
)

# Settings of an arm, by name: what the search has chosen.
Chosen = Mapping[str, Mapping[str, Any]]

ABLATED_USERS = 1500  # the axes that train reward models of their own do so on this many labelled users


def search_jobs(planner: Planner) -> None:
    """The same small search for every arm, on development users and a seed of its own."""
    world = World(SEARCH_SEED)
    for arm in COMPARED:
        for number, changes in enumerate(PPO_SEARCH):
            chosen = ppo_settings(changes)
            planner.ppo("search", world, arm, chosen, split="dev", label=f"{arm}-{number}")
    for number, changes in enumerate(DPO_SEARCH):
        planner.dpo("search", world, dpo_settings(changes), split="dev", label=f"dpo-{number}")


def ppo_settings(changes: Mapping[str, Any]) -> dict[str, Any]:
    """A point of the PPO arms' search."""
    return {**PPO_CENTRE, **changes}


def dpo_settings(changes: Mapping[str, Any]) -> dict[str, Any]:
    """A point of DPO's search."""
    return {**DPO_CENTRE, **changes}


def main_jobs(planner: Planner, scale: Scale, chosen: Chosen) -> None:
    """Every system on every seed, and the controls."""
    planner.controls("main", World(0))
    for seed in scale.seeds:
        world = World(seed)
        planner.sft_record("main", world)
        for system in PPO_SYSTEMS:
            planner.ppo("main", world, system, chosen[TUNED_AS.get(system, system)])
        planner.dpo("main", world, chosen["dpo"])


def budget_jobs(planner: Planner, scale: Scale, chosen: Chosen) -> None:
    """Fewer labelled users."""
    for users, seeds in scale.budgets.items():
        for seed in seeds:
            compare_jobs(planner, f"budget{users}", World(seed, users=users), chosen)


def compare_jobs(planner: Planner, axis: str, world: World, chosen: Chosen) -> None:
    """TPPO and the two PPO baselines with their own reward models."""
    for system in COMPARED:
        planner.ppo(axis, world, system, chosen[system])


def axis_jobs(planner: Planner, scale: Scale, chosen: Chosen) -> None:
    """What a dense reward depends on, one thing at a time: first what the reward is made of, then PPO's options."""
    for seed in scale.axis_seeds:
        for noise in LABEL_NOISE:
            world = World(seed, users=ABLATED_USERS, noise=noise)
            compare_jobs(planner, f"noise{noise:g}", world, chosen)
        for w in WEIGHTS:
            planner.ppo(f"w{w:g}", World(seed, users=ABLATED_USERS), "tppo", chosen["tppo"], w=w)
        for k in LENGTHS:
            world = World(seed, k=k, users=ABLATED_USERS)
            planner.sft_record(f"k{k}", world)
            compare_jobs(planner, f"k{k}", world, chosen)
        _ablations(planner, seed, chosen, REWARD_ABLATIONS)
    for seed in scale.axis_seeds:
        for system in COMPARED:
            changes = {"reward_from": "monitor", "sentence_coef": str(SENTENCE_COEF)}
            planner.ppo("oracle", World(seed), system, chosen[system], changes=changes)
        _ablations(planner, seed, chosen, OPTION_ABLATIONS)


def real_jobs(planner: Planner, scale: Scale, chosen: Chosen) -> None:
    """The same comparison on real logs."""
    planner.controls("real", World(0, real=True))
    for seed in scale.real_seeds:
        world = World(seed, real=True)
        planner.sft_record("real", world)
        for system in COMPARED:
            planner.ppo("real", world, system, chosen[system])
        planner.dpo("real", world, chosen["dpo"])


def _ablations(planner: Planner, seed: int, chosen: Chosen, ablations: Mapping[str, Mapping[str, str]]) -> None:
    for name, changes in ablations.items():
        if name != f"credit_{chosen['tppo']['credit']}":  # that is TPPO as it is
            planner.ppo(f"ablation_{name}", World(seed), "tppo", chosen["tppo"], changes=changes)
