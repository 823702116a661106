"""The tables of the results page, in Markdown, from what `reproduction.json` holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from common.evaluation.report import escape
from study.figures import LABELS
from study.settings import BASELINES, COMPARED

MEASURES = {
    "relevance_rate": "relevance", "unique_relevance_rate": "unique relevant", "mean_word_score": "word score",
    "token_f1": "token F1", "recall_new": "recall, new", "recall_repeated": "recall, repeated", "copy_rate": "copied",
    "duplicate_rate": "duplicates", "distinct_2": "distinct-2", "words_per_query": "words", "format_error_rate":
    "format errors", "repeated_word_rate": "repeated words", "function_word_rate": "function words",
}  # fmt: skip
COMPARISONS = {
    "relevance_rate": "relevance", "unique_relevance_rate": "unique relevant", "item_win_rate": "items won less lost",
    "unique_item_win_rate": "items won less lost by unique", "recall": "recall",
}  # fmt: skip


def systems_table(
    systems: Mapping[str, Any], decoding: str, measures: Sequence[str] = tuple(MEASURES)
) -> str:
    """A row a system; relevance with its interval."""
    rows = []
    for name, system in systems.items():
        cells = [share(system["relevance_rate"])]
        cells += [number(system[measure]["mean"]) for measure in measures if measure != "relevance_rate"]
        rows.append([LABELS.get(name, name), *cells, number(system["kl"]["mean"], 2)])
    return table([decoding, *(MEASURES[measure] for measure in measures), "KL"], rows)


def controls_table(controls: Mapping[str, Any]) -> str:
    """The rules, by the simulated truth."""
    names = {"copy_last": "copy the last queries", "user_frequent": "the user's most frequent", "popularity":
             "everybody's most frequent"}  # fmt: skip
    rows = [[names[name], number(found["relevance_rate"]), number(found["recall"]), number(found["copy_rate"]),
             share(found["any_relevant"])] for name, found in controls.items()]  # fmt: skip
    return table(["rule", "relevance", "recall", "copied", "lists with a relevant query (Wilson)"], rows)


def differences_table(differences: Mapping[str, Any]) -> str:
    """TPPO and the PPO arms against each baseline, in points."""
    rows = []
    for name, found in differences.items():
        a, b = name.split("_minus_")
        if a == "tppo" or (a, b) in {("ppo_query", "ppo_response"), ("ppo_response", "sft"), ("ppo_query", "sft")}:
            cells = [points(of[measure]) for measure in COMPARISONS for of in (found, found["greedy"])]
            rows.append([f"{LABELS[a]} - {LABELS[b]}", *cells])
    head = [f"{measure}, {decoding}" for measure, decoding in product(COMPARISONS.values(), ("sampled", "greedy"))]
    return table(["points", *head], rows)


def win_table(differences: Mapping[str, Any], names: Sequence[str]) -> str:
    """Row against column: win / tie / lose."""
    rows = [
        [LABELS[a], *("" if a == b else " / ".join(number(differences[f"{a}_minus_{b}"][outcome]["mean"], 2)
                                                  for outcome in ("win", "tie", "lose")) for b in names)]
        for a in names
    ]  # fmt: skip
    return table(["win / tie / lose", *(LABELS[name] for name in names)], rows)


def equal_kl_table(found: Mapping[str, Any]) -> str:
    """Relevance of each arm at each KL."""
    rows = [[LABELS[name], *map(number, rates)] for name, rates in found.items() if name != "levels"]
    return table(["KL", *(f"{level:g}" for level in found["levels"])], rows)


def reach_table(found: Mapping[str, Mapping[str, int | None]]) -> str:
    """A row an arm, a column the final level of each."""
    arms = [name.removesuffix("_final") for name in found]
    rows = [[LABELS[b], *("never" if (n := found[f"{a}_final"][b]) is None else str(n) for a in arms)] for b in arms]
    return table(["rollouts", *(f"{LABELS[a]}'s last" for a in arms)], rows)


def examples_table(systems: Mapping[str, Mapping[int, Any]]) -> str:
    """What the compared systems of one seed write for the first users, sampled and greedy."""
    shown = [name for name in ("sft", *COMPARED) if name in systems]
    if not shown:
        return ""
    examples = {name: systems[name][min(systems[name])]["examples"] for name in shown}
    rows = []
    for index, example in enumerate(examples[shown[0]]):
        asked = " / ".join(map(escape, example["history"]))
        for decoding in ("sampled", "greedy"):
            lists = [escape(" / ".join(examples[name][index][decoding].split("\n"))) for name in shown]
            rows.append([asked if decoding == "sampled" else "", decoding, *lists])
    return table(["the user searched", "decoding", *(LABELS[name] for name in shown)], rows)


def axis_table(axes: Mapping[str, Any], label: str) -> str:
    """Relevance of each arm at each value, and TPPO's differences."""
    rows = []
    for name, found in sorted(axes.items(), key=lambda item: _natural(item[0])):
        systems, differences = found["systems"], found["differences"]
        cells = [share(systems[arm]["relevance_rate"]) if arm in systems else "" for arm in COMPARED]
        cells += [points(differences[f"tppo_minus_{b}"]["relevance_rate"]) if f"tppo_minus_{b}" in differences else ""
                  for b in BASELINES]  # fmt: skip
        cells += [points(differences["tppo_minus_ppo_response"]["item_win_rate"])
                  if "tppo_minus_ppo_response" in differences else ""]  # fmt: skip
        greedy = [share(systems[arm]["greedy"]["relevance_rate"]) if arm in systems else "" for arm in COMPARED]
        seeds = str(len(systems["tppo"]["relevance_rate"]["seeds"])) if "tppo" in systems else ""
        rows.append([name, seeds, *cells, *greedy])
    head = [LABELS[arm] for arm in COMPARED]
    head += [f"TPPO - {LABELS[b]}, points" for b in BASELINES] + ["items won less lost, end of response"]
    return table([label, "seeds", *head, *(f"{LABELS[arm]}, greedy" for arm in COMPARED)], rows)


def ablation_table(found: Mapping[str, Any]) -> str:
    """A row a change: differences of both decodings, the KL, the largest ratio of an update."""
    rows = [
        [name, points(change["relevance_rate"]), points(change["greedy"]["relevance_rate"]),
         number(change["kl"]["mean"], 2), number(change["max_ratio"], 2)]
        for name, change in sorted(found.items())
    ]  # fmt: skip
    return table(["change", "relevance, sampled", "relevance, greedy", "KL", "largest ratio"], rows)


def search_table(search: Mapping[str, Any]) -> str:
    """Every point that was tried, the chosen one in bold."""
    rows = []
    for arm, tried in search["tried"].items():
        for point in tried:
            chosen = point["settings"] == search["chosen"][arm]
            settings = ", ".join(f"{key} {value}" for key, value in point["settings"].items())
            cells = [settings, *(number(point[key]) for key in ("sampled", "greedy")),
                     number(point["kl"], 2)]  # fmt: skip
            rows.append([LABELS[arm], *(f"**{cell}**" if chosen else cell for cell in cells)])
    note = (
        f"Development users, seed {search['seed']}; chosen is the best mean of sampled and greedy relevance with a KL "
        f"of at most {search['max_kl']:g} nats a response. The token RM moved elsewhere takes that arm's settings."
    )
    return f"{note}\n\n" + table(["arm", "settings", "sampled", "greedy", "KL"], rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def share(estimate: Mapping[str, Any]) -> str:
    """`.412 [.400, .424]`."""
    if estimate["low"] is None:
        return number(estimate["mean"])
    return f"{number(estimate['mean'])} [{number(estimate['low'])}, {number(estimate['high'])}]"


def points(estimate: Mapping[str, Any]) -> str:
    """`+4.1 [+2.0, +6.2]`, in points."""
    if estimate["mean"] is None:
        return "undefined"
    return f"{100 * estimate['mean']:+.1f} [{100 * estimate['low']:+.1f}, {100 * estimate['high']:+.1f}]"


def number(value: float | None, digits: int = 3) -> str:
    """A number without its leading zero, or a dash."""
    return "-" if value is None else f"{value:.{digits}f}"


def _natural(name: str) -> tuple[str, float]:
    """Sorts names that end in numbers by those."""
    letters = name.rstrip("0123456789.")
    return letters, float(name[len(letters) :] or 0)
