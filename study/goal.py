"""What the project set itself, and whether the records show it: the head of the results page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from study.figures import LABELS
from study.settings import BASELINES
from study.tables import number, points, table

# TPPO less each baseline, in points of 100.
WANTED = {
    ("ppo_response", "relevance_rate"): 4.0,
    ("ppo_response", "item_win_rate"): 8.0,
    ("ppo_query", "relevance_rate"): 2.0,
}
NAMES = {"relevance_rate": "relevance", "item_win_rate": "items won less lost"}
FEW_LABELS, FEW_TIMES = "150", 2.0  # with so few labelled users, so many times as much is wanted

Row = tuple[str, str, str, bool]


def goal_section(results: Mapping[str, Any]) -> str:
    """One sentence, then a row for each part of the goal: what was found, what was wanted, whether it was reached."""
    needed = {f"tppo_minus_{baseline}" for baseline in BASELINES}
    if not needed <= set(results["differences"]):
        return "The main comparison has not been run yet."
    rows = margin_rows(results["differences"], "all labels", 1.0)
    seeds = str(_seeds(results["systems"]))
    few = results["label_budget"].get(FEW_LABELS)
    if few and needed <= set(few["differences"]):
        rows += margin_rows(few["differences"], f"{FEW_LABELS} labelled users", FEW_TIMES)
        seeds += f" ({FEW_LABELS} labelled users: {_seeds(few['systems'])})"
    rows += [*drift_rows(results["systems"]), reach_row(results)]
    missed = sum(not reached for *_, reached in rows)
    fail = "fails" if missed == 1 else "fail"
    head = f"not reached: {missed} of {len(rows)} parts {fail}" if missed else "reached"
    cells = [[*row, "yes" if reached else "**no**"] for *row, reached in rows]
    return f"**The goal is {head}.** TPPO against the two PPO baselines, seeds: {seeds}.\n\n" + table(
        ["part of the goal", "found", "wanted", "reached"], cells
    )


def _seeds(systems: Mapping[str, Any]) -> int:
    return len(systems["tppo"]["relevance_rate"]["seeds"])


def margin_rows(differences: Mapping[str, Any], setting: str, times: float) -> list[Row]:
    """The margins: wide enough, and their intervals clear of zero."""
    rows = []
    for (baseline, measure), wanted in WANTED.items():
        for decoding in ("sampled", "greedy"):
            found = differences[f"tppo_minus_{baseline}"]
            estimate = (found if decoding == "sampled" else found["greedy"])[measure]
            reached = 100 * estimate["mean"] >= times * wanted and estimate["low"] > 0
            part = f"{setting}: {NAMES[measure]} over {LABELS[baseline]}, {decoding}"
            rows.append((part, points(estimate), f"{times * wanted:g} or more", reached))
    return rows


def drift_rows(systems: Mapping[str, Any]) -> list[Row]:
    """No higher KL than the baselines, in nats a response, mean over seeds."""
    own = systems["tppo"]["kl"]["mean"]
    return [
        (f"KL to SFT, against {LABELS[baseline]}", number(own, 2), f"at most {number(kl, 2)}", own <= kl)
        for baseline in BASELINES
        for kl in [systems[baseline]["kl"]["mean"]]
    ]


def reach_row(results: Mapping[str, Any]) -> Row:
    """The end-of-response arm's final level with half its rollouts."""
    needed = results["rollouts_to_reach"]["ppo_response_final"]["tppo"]
    half = results["rollouts"] // 2
    part = f"rollouts to the final level of {LABELS['ppo_response']}"
    return part, "never" if needed is None else str(needed), f"at most {half}", needed is not None and needed <= half
