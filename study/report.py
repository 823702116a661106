"""The study's results as files: `reproduction.json` for programs, `README.md` with tables and figures for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.files import atomic_write, read_json, write_json
from study.aggregate import (
    Runs,
    ablation,
    at_equal_kl,
    group_runs,
    rollouts_of,
    rollouts_to_reach,
    summarise_axis,
)
from study.figures import draw_all
from study.goal import goal_section
from study.records import Records
from study.settings import TEMPERATURE
from study.tables import (
    ablation_table,
    axis_table,
    controls_table,
    differences_table,
    equal_kl_table,
    examples_table,
    reach_table,
    search_table,
    systems_table,
    win_table,
)

ABLATION = "ablation_"
JSON_NAME, PAGE_NAME = "reproduction.json", "README.md"
KL_LEVELS = (1.0, 2.0, 3.0, 4.0)
CAPTIONS = {
    "reward_models": "Reward models on held-out users: token-level (words and queries) against sentence-level.",
    "ppo_curves": "Relevance of the rollouts by the simulated truth, the same scale for all arms.",
    "relevance_and_kl": "Relevance against the KL to the SFT model.",
    "over_optimisation": "Reward against judgement, and the reward model's calibration as the policy drifts.",
    "credit": "Where in a response the advantage and the reward fall.",
    "query_length": "Relevance by the number of words of a query.",
    "label_budget": "Labelled users behind the reward model.",
    "label_noise": "Noise of the labels (1500 labelled users). A point without a bar is one seed.",
    "queries": "Queries a response (1500 labelled users). A point without a bar is one seed.",
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
        "rollouts": rollouts_of(main),
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


def greedy_of(systems: Mapping[str, Any]) -> dict[str, Any]:
    """The greedy measures of each system in the place of the sampled ones."""
    return {name: {**system["greedy"], "kl": system["kl"]} for name, system in systems.items()}


def page(results: Mapping[str, Any], runs: Runs, search: Mapping[str, Any] | None, figures: Sequence[str]) -> str:
    """The page for people."""
    parts = [
        "# Results",
        goal_section(results),
        "Rates are shares of the queries asked for, on test users that nothing was trained or chosen on. Sampled is at "
        f"temperature {TEMPERATURE:g}, as in training, greedy the likeliest token. Intervals are 95 %: of a system "
        "over its seeds (Student's t), of a difference over seeds and users (pigeonhole bootstrap). "
        "What was found: [findings.md](findings.md). "
        "All of it is made by `bash scripts/reproduce.sh`; tables and figures alone, from `records/`, by "
        "`bash scripts/reproduce.sh --report_only`. Each record names its commands.",
        "## Systems",
        systems_table(results["systems"], "sampled"),
        systems_table(greedy_of(results["systems"]), "greedy"),
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
        "### What they write\n\nThe first users of the test split, seed 1; a slash stands for a line break.",
        examples_table(runs.get("main", {})),
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
                  systems_table(greedy_of(results["real"]["systems"]), "greedy"),
                  differences_table(results["real"]["differences"]),
                  "The rules write words that the user wrote before, which this annotator calls relevant by itself.",
                  controls_table(results["real"]["controls"])]  # fmt: skip
    if search:
        parts += ["## The search", search_table(search)]
    parts += ["## Figures", *(f"### {name}\n\n{CAPTIONS[name]}\n\n![{name}](figures/{name}.png)" for name in figures)]
    return "\n\n".join(parts) + "\n"
