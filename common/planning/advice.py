"""What to change in a run that does not fit: settings are tried one after the other, and planned again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

from common.errors import InputError
from common.planning.plan import Machine, Plan, shown

Config = TypeVar("Config")
RANKS = "ranks"  # in place of a setting: more GPUs
LOWERS = 0.995  # a change that leaves more of the peak than this is not worth its cost
MOST_ROUNDS = 3


class Change(NamedTuple):
    """A setting (or `RANKS`) and the values to try in turn, mildest first; what it costs."""

    setting: str
    values: Sequence[Any]
    cost: str


class Step(NamedTuple):
    """A change that was taken, and the plan with it and all before it."""

    flag: str
    cost: str
    plan: Plan


def halvings(value: int, least: int = 1) -> list[int]:
    """`value` halved again and again, down to `least`."""
    found = []
    while value // 2 >= least:
        value //= 2
        found.append(value)
    return found


def common_changes(config: Any, machine: Machine) -> Iterable[Change]:
    """What every step can do besides its own batch sizes, cheapest first."""
    if not config.gradient_checkpointing:
        yield Change("gradient_checkpointing", [True], "a third more compute in training")
    if config.zero_stage < 3 and not config.deepspeed_config and machine.ranks > 1:
        yield Change("zero_stage", [3], "weights are gathered layer by layer")


def slow_changes(config: Any, machine: Machine) -> Iterable[Change]:
    """What costs much time."""
    if machine.cuda and config.offload == "none" and not config.deepspeed_config:
        yield Change("offload", ["optimizer"], "slow optimiser steps, and host memory")


def last_changes(config: Any, machine: Machine) -> Iterable[Change]:
    """What changes the result, or costs money."""
    if getattr(config, "lora_r", None) == 0:
        yield Change("lora_r", [16], "adapters alone are trained; raise the learning rate tenfold")
    yield Change("max_prompt_tokens", halvings(config.max_prompt_tokens, 128), "older events are left out")
    yield Change(RANKS, [machine.ranks * factor for factor in (2, 4, 8)], "more GPUs")


def advise(
    config: Config, machine: Machine, make_plan: Callable[[Config, Machine], Plan], changes: Iterable[Change]
) -> list[Step]:
    """The changes, in their order, that each lower the peak, until the plan fits; the last one's plan may still not.

    Values that the config refuses are passed over, and changes that turn out not to be needed are left out.
    """
    changes = list(changes)
    costs = {change.setting: change.cost for change in changes}

    def planned(settings: dict[str, Any]) -> Plan:
        own = {name: value for name, value in settings.items() if name != RANKS}
        ranks = settings.get(RANKS, machine.ranks)
        return make_plan(dataclasses.replace(config, **own), dataclasses.replace(machine, ranks=ranks))

    chosen: dict[str, Any] = {}
    plan = planned(chosen)
    for _ in range(MOST_ROUNDS):  # what did not touch the fullest phase may once another one is
        for setting, value in ((change.setting, value) for change in changes for value in change.values):
            if plan.verdict == "fits" or chosen.get(setting) == value:
                continue
            try:
                found = planned(chosen | {setting: value})
            except InputError:
                continue
            if found.peak < LOWERS * plan.peak:
                chosen[setting], plan = value, found
    for setting in list(chosen):
        without = {name: value for name, value in chosen.items() if name != setting}
        if plan.verdict == "fits" and planned(without).verdict == "fits":
            chosen = without
    steps = [dict(list(chosen.items())[: number + 1]) for number in range(len(chosen))]
    return [
        Step(_flag(setting, chosen[setting]), costs[setting], planned(settings))
        for setting, settings in zip(chosen, steps, strict=True)
    ]


def advice_text(steps: Sequence[Step]) -> str:
    """The changes one to a line, each with the peak that it leaves."""
    if not steps:
        return "no setting known to the planner lowers the peak: take a smaller model or larger GPUs"
    width = max(len(step.flag) for step in steps)
    lines = [
        f"  {number}. {step.flag.ljust(width)}  {shown(step.plan.peak)}, {step.plan.verdict}; {step.cost}"
        for number, step in enumerate(steps, start=1)
    ]
    return "\n".join(["what to change, in this order, each on top of those before it:", *lines])


def advice_line(steps: Sequence[Step]) -> str:
    """The changes as a part of a paragraph."""
    if not steps:
        return "take a smaller model or larger GPUs"
    parts = [f"{step.flag} ({shown(step.plan.peak)})" for step in steps]
    rest = "" if steps[-1].plan.verdict != "does not fit" else ", which is still too much"
    return f"add {', then '.join(parts)}{rest}"


def _flag(setting: str, value: Any) -> str:
    if setting == RANKS:
        return f"{value} GPUs"
    return f"--{setting} {str(value).lower() if isinstance(value, bool) else value}"
