"""The study's results as files: `reproduction.json` for programs, `README.md` with tables and figures for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from common.files import atomic_write, read_json, write_json
from study.aggregate import Runs, ablation, at_equal_kl, group_runs, rollouts_to_reach, summarise_axis
from study.figures import LABELS, draw_all
from study.records import Records
from study.settings import COMPARED, TEMPERATURE

ABLATION = "ablation_"
JSON_NAME, PAGE_NAME = "reproduction.json", "README.md"
KL_LEVELS = (1.0, 2.0, 3.0, 4.0)
MEASURES = {
    "relevance_rate": "relevance", "unique_relevance_rate": "unique relevant", "mean_word_score": "word score",
    "recall_new": "recall, new", "recall_repeated": "recall, repeated", "copy_rate": "copied",
    "duplicate_rate": "duplicates", "distinct_2": "distinct-2", "words_per_query": "words", "format_error_rate":
    "format errors", "repeated_word_rate": "repeated words", "function_word_rate": "function words",
}  # fmt: skip
# What the project set itself, in points: TPPO less each baseline.
GOALS = {
    ("ppo_response", "relevance_rate"): 4.0,
    ("ppo_response", "item_win_rate"): 8.0,
    ("ppo_query", "relevance_rate"): 2.0,
}
CAPTIONS = {
    "reward_models": "Reward models on held-out users: token-level (words and queries) against sentence-level.",
    "ppo_curves": "Relevance of the rollouts by the simulated truth, the same scale for all arms.",
    "relevance_and_kl": "Relevance against the KL to the SFT model.",
    "over_optimisation": "Reward against judgement, and the reward model's calibration as the policy drifts.",
    "credit": "Where in a response the advantage and the reward fall.",
    "query_length": "Relevance by the number of words of a query.",
    "label_budget": "Labelled users behind the reward model.",
    "label_noise": "Noise of the labels (1500 labelled users).",
    "queries": "Queries a response (1500 labelled users).",
    "w": "w, the local loss's share of the reward model's loss, down to the final policy (1500 labelled users).",
    "ablations": "TPPO with one setting changed; each dot is a seed.",
}


def write_results(folder: Path) -> None:
    """Aggregate the records in `folder/records` and write everything beside them."""
    records = dict(Records(folder / "records").read())
    runs = group_runs({name: record for name, record in records.items() if not name.startswith("search/")})
    rewards = {name: record for name, record in records.items() if "metrics" in record}
    search = read_json(folder / "search.json") if (folder / "search.json").is_file() else None
    results = aggregate(runs, rewards)
    write_json(folder / JSON_NAME, results)
    figures = draw_all(runs, rewards, folder / "figures")
    with atomic_write(folder / PAGE_NAME) as stream:
        stream.write(page(results, runs, search, figures))


def aggregate(runs: Runs, rewards: Mapping[str, Any]) -> dict[str, Any]:
    """What `reproduction.json` holds. Rates are fractions of 1; a part that was not run is left out."""
    main = runs.get("main", {})
    results: dict[str, Any] = {
        **summarise_axis(main),
        "lexical": summarise_axis(main, "lexical"),
        "rollouts_to_reach": rollouts_to_reach(main),
        "relevance_at_kl": {"levels": KL_LEVELS, **at_equal_kl(main, KL_LEVELS)},
        "label_budget": {
            name.removeprefix("budget"): summarise_axis(systems)
            for name, systems in runs.items() if name.startswith("budget")
        },
        "axes": {
            name: summarise_axis(systems)
            for name, systems in runs.items()
            if name not in ("main", "real") and not name.startswith(("budget", ABLATION))
        },
        "ablations": {
            name.removeprefix(ABLATION): ablation(systems["tppo"], main["tppo"])
            for name, systems in runs.items() if name.startswith(ABLATION) and "tppo" in main
        },
        "reward_models": {name: record["metrics"] for name, record in rewards.items()},
    }  # fmt: skip
    if "real" in runs:
        results["real"] = summarise_axis(runs["real"], "lexical")
    return results


def page(results: Mapping[str, Any], runs: Runs, search: Mapping[str, Any] | None, figures: Sequence[str]) -> str:
    """The page for people."""
    parts = [
        "# Results",
        goal_paragraph(results),
        "Rates are shares of the queries asked for, on test users that nothing was trained or chosen on. Sampled is at "
        f"temperature {TEMPERATURE:g}, as in training, greedy the likeliest token. Intervals are 95 %: of a system "
        "over its seeds (Student's t), of a difference over seeds and users (pigeonhole bootstrap). "
        "What was found: [findings.md](findings.md). "
        "All of it is made by `bash scripts/reproduce.sh`; tables and figures alone, from `records/`, by "
        "`bash scripts/reproduce.sh --report_only`. Each record names its commands.",
        "## Systems",
        systems_table(results["systems"], "sampled"),
        systems_table({name: {**s["greedy"], "kl": s["kl"]} for name, s in results["systems"].items()}, "greedy"),
        "### Judged by the lexical annotator\n\nIt compares with the words of the history and of the logged next "
        "queries, so it also pays for the log's noise.",
        systems_table(results["lexical"]["systems"], "sampled", ("relevance_rate", "mean_word_score")),
        "### Without a model",
        controls_table(results["controls"]),
        "## Differences",
        differences_table(results["differences"]),
        "### Win, tie and lose, sampled\n\nAn item (user) is won by more relevant queries.",
        win_table(results["differences"], list(results["systems"])),
        "### At equal KL\n\nRelevance of the rollouts when an arm's mean KL first reached a level (nats a response).",
        equal_kl_table(results["relevance_at_kl"]),
        "### Rollouts to reach\n\nAfter how many rollouts the row's curve was at the column's last level.",
        reach_table(results["rollouts_to_reach"]),
    ]
    if results["label_budget"]:
        parts += ["## Label budget", axis_table(results["label_budget"], "labelled users")]
    if results["axes"]:
        parts += ["## Other axes", axis_table(results["axes"], "axis")]
    if results["ablations"]:
        parts += ["## TPPO with one thing changed\n\nLess TPPO as it is, in points, on the same seeds and users.",
                  ablation_table(results["ablations"])]  # fmt: skip
    if "real" in results:
        parts += ["## Real logs\n\nLexical annotator; the truth is what the users searched next.",
                  systems_table(results["real"]["systems"], "sampled"),
                  differences_table(results["real"]["differences"])]  # fmt: skip
    if search:
        parts += ["## The search", search_table(search)]
    parts += ["## Figures", *(f"### {name}\n\n{CAPTIONS[name]}\n\n![{name}](figures/{name}.png)" for name in figures)]
    return "\n\n".join(parts) + "\n"


def goal_paragraph(results: Mapping[str, Any]) -> str:
    """Whether the goal was reached, part by part; the first thing on the page."""
    lines, reached = [], True
    for (baseline, measure), wanted in GOALS.items():
        for decoding in ("sampled", "greedy"):
            found = results["differences"].get(f"tppo_minus_{baseline}")
            if found is None:
                return "The main comparison has not been run yet."
            estimate = (found if decoding == "sampled" else found["greedy"])[measure]
            good = 100 * estimate["mean"] >= wanted and estimate["low"] > 0
            reached &= good
            lines.append(
                f"- {measure.replace('_', ' ')} over {LABELS[baseline]}, {decoding}: {points(estimate)}, wanted "
                f"{wanted:g} or more: {'reached' if good else '**not reached**'}"
            )
    head = "**The goal is reached.**" if reached else "**The goal is not reached in every part.**"
    seeds = len(results["systems"]["tppo"]["relevance_rate"]["seeds"])
    kl = {name: results["systems"][name]["kl"]["mean"] for name in COMPARED}
    drift = ", ".join(f"{LABELS[name]} {value:.2f}" for name, value in kl.items())
    return f"{head} TPPO less the baselines, in points, {seeds} seeds:\n\n" + "\n".join(
        [*lines, f"- KL to the SFT model, nats a response: {drift}"]
    )


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
            cells = [points(of[measure]) for measure in ("relevance_rate", "item_win_rate", "recall")
                     for of in (found, found["greedy"])]  # fmt: skip
            rows.append([f"{LABELS[a]} - {LABELS[b]}", *cells])
    head = [f"{measure}, {decoding}" for measure, decoding in
            product(("relevance", "items won less lost", "recall"), ("sampled", "greedy"))]  # fmt: skip
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


def axis_table(axes: Mapping[str, Any], label: str) -> str:
    """Relevance of each arm at each value, and TPPO's differences."""
    rows = []
    for name, found in sorted(axes.items(), key=lambda item: _natural(item[0])):
        systems, differences = found["systems"], found["differences"]
        cells = [share(systems[arm]["relevance_rate"]) if arm in systems else "" for arm in COMPARED]
        cells += [points(differences[f"tppo_minus_{b}"]["relevance_rate"]) if f"tppo_minus_{b}" in differences else ""
                  for b in COMPARED[:2]]  # fmt: skip
        cells += [points(differences["tppo_minus_ppo_response"]["item_win_rate"])
                  if "tppo_minus_ppo_response" in differences else ""]  # fmt: skip
        greedy = [share(systems[arm]["greedy"]["relevance_rate"]) if arm in systems else "" for arm in COMPARED]
        rows.append([name, *cells, *greedy])
    head = [LABELS[arm] for arm in COMPARED]
    head += [f"TPPO - {LABELS[b]}, points" for b in COMPARED[:2]] + ["items won less lost, end of response"]
    return table([label, *head, *(f"{LABELS[arm]}, greedy" for arm in COMPARED)], rows)


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
        f"Development users, seed {search['seed']}; chosen is the best sampled relevance rate with a KL "
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
