"""Which settings each arm gets: the best of the same small search, on development users."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from study.parts import dpo_settings, ppo_settings
from study.settings import COMPARED, DPO_SEARCH, MAX_KL, PPO_SEARCH, SEARCH_SEED


def choose(records: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """`{"chosen": {arm: settings}, "tried": {arm: [...]}}` from the records of the search.

    The objective is the relevance rate by the simulated truth, the mean of sampled and greedy decoding, since arms are
    compared by both; what drifts further than `MAX_KL` is out, unless every point of the arm does: then the one that
    drifts least is taken.
    """
    grids = {arm: [ppo_settings(changes) for changes in PPO_SEARCH] for arm in COMPARED}
    grids["dpo"] = [dpo_settings(changes) for changes in DPO_SEARCH]
    chosen, tried = {}, {}
    for arm, grid in grids.items():
        points = [
            {"settings": settings, **_outcome(records[f"search/s{SEARCH_SEED}/{arm}-{number}"])}
            for number, settings in enumerate(grid)
        ]
        near = [point for point in points if point["kl"] <= MAX_KL]
        best = max(near, key=_objective) if near else min(points, key=lambda point: point["kl"])
        chosen[arm], tried[arm] = best["settings"], points
    return {"chosen": chosen, "tried": tried, "max_kl": MAX_KL, "split": "dev", "seed": SEARCH_SEED}


def _objective(point: Mapping[str, Any]) -> float:
    return (point["sampled"] + point["greedy"]) / 2


def _outcome(record: Mapping[str, Any]) -> dict[str, float]:
    rates = {
        decoding: judges["simulated"]["means"]["relevance_rate"] for decoding, judges in record["decodings"].items()
    }
    return {**rates, "kl": record["kl"]}
