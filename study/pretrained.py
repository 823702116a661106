"""The page of pretrained models, from finished runs of scripts/run_all.sh: tables, curves, and what each model writes.

    python -m study.pretrained --runs cast=outputs/cast logs=outputs/logs --show cast --notes "cast=on a busy machine"

What each run measured goes to `pretrained.json` in the results folder; the page and its figure are drawn from it, also
without the runs (`--report_only`). Answers are kept and shown for the runs in `--show` alone: they quote the log.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from common.config import option, parse_config
from common.data.examples import load_examples
from common.data.records import SPLITS, Example
from common.errors import InputError, run_command
from common.evaluation.report import escape, format_estimate
from common.evaluation.statistics import estimate_means
from common.evaluation.summary import measure_table, score_rows, summarise
from common.feedback.load import load_annotator
from common.files import atomic_write, read_json, read_jsonl, write_json
from common.tracking import read_metrics
from study.controls import copy_last
from study.tables import number, table

matplotlib.use("Agg")
from matplotlib import pyplot as plt

RECORD_NAME, PAGE_NAME, FIGURE_NAME = "pretrained.json", "pretrained.md", "figures/pretrained.png"
NAMES = {"base": "base model", "sft": "SFT", "tppo": "TPPO", "copy": "copy of the last queries", "gold": "logged"}
MEASURES = {
    "relevance_rate": "relevance", "unique_relevance_rate": "relevance, no repeats", "mean_word_score": "word score",
    "token_f1": "token F1", "recall_new": "recall, new", "copy_rate": "copied", "duplicate_rate": "duplicates",
    "format_error_rate": "format errors",
}  # fmt: skip
CURVES = {
    "reward/score_per_response": "reward a response, without KL", "kl/per_sequence": "KL to SFT, nats a response",
    "value/explained_variance": "critic's explained variance", "response/format_error_rate": "format errors",
}  # fmt: skip
REWARD_METRICS = ("word_auc", "token_auc", "sentence_auc", "sentence_spearman")
SHOWN = 10
SHOWN_LINES = 4
LAST = 4  # rollouts that the final KL is a mean of
RESAMPLES = 10_000


@dataclass
class PretrainedConfig:
    """Write the page of pretrained models from finished runs."""

    runs: list[str] = option([], "name=folder of each run.")
    show: list[str] = option([], "Names of runs whose answers the page quotes; only logs that may be shipped.")
    notes: list[str] = option([], "name=text on how a run was made, such as what else the machine did.")
    results_dir: str = option("docs/results", "Where record, page and figure go.")
    report_only: bool = option(False, "Draw page and figure from the record that is there.")


def main() -> None:
    """Read the runs, write the record, the figure and the page."""
    config = parse_config(PretrainedConfig)
    folder = Path(config.results_dir)
    if not config.report_only:
        runs, notes = (dict(pair.partition("=")[::2] for pair in pairs) for pairs in (config.runs, config.notes))
        if not runs or not all(runs.values()):
            raise InputError("--runs needs name=folder for each run, such as cast=outputs/cast")
        records = {
            name: read_run(Path(path), name in config.show) | {"note": notes.get(name, "")}
            for name, path in runs.items()
        }
        write_json(folder / RECORD_NAME, records)
    records = read_json(folder / RECORD_NAME)
    draw(records, folder / FIGURE_NAME)
    with atomic_write(folder / PAGE_NAME) as stream:
        stream.write(page(records))
    print(f"page: {folder / PAGE_NAME}\nrecord: {folder / RECORD_NAME}")


def read_run(folder: Path, show: bool) -> dict[str, Any]:
    """What a run measured. Raises `InputError` where a file of it is missing."""
    report = read_json(folder / "report.json")
    examples = load_examples(folder / "data", report["data"]["split"])
    evaluated = {row["id"] for _, row in read_jsonl(folder / "generations" / "sft_sampled.jsonl")}
    examples = [example for example in examples if example.id in evaluated]
    settings = read_json(folder / "run.json")
    return {
        "settings": {name: settings[name] for name in ("model", "reward_model", "annotator", "seed")},
        "examples": {
            split: [len(found), len({example.user_id for example in found})]
            for split in SPLITS
            for found in [load_examples(folder / "data", split)]
        },
        "evaluated": report["data"],
        "decoding": report["decoding"],
        "machine": machine(folder),
        "seconds": {path.stem: read_json(path)[path.stem] for path in sorted((folder / "stages").glob("*.json"))},
        "step1": [
            {name: row[name] for name in ("step", "epoch", "eval_loss", "eval_perplexity")}
            for row in read_metrics(folder / "step1_sft" / "metrics.jsonl")
            if "eval_loss" in row
        ],
        "step2": read_json(folder / "step2_token_reward" / "reward" / "metrics.json"),
        "step3": [
            {name: row[name] for name in ("step", *CURVES, "seconds/step")}
            for row in read_metrics(folder / "step3_tppo" / "metrics.jsonl")
        ],
        "systems": report["systems"],
        "gold": report["references"]["gold"],
        "copy": control(examples, report["num_queries"], report["annotator"]),
        "comparisons": report["comparisons"],
        "warnings": report["warnings"],
        "answers": answers(folder, examples) if show else [],
    }


def machine(folder: Path) -> dict[str, Any]:
    """What step 3 ran on."""
    found = read_json(folder / "step3_tppo" / "environment.json")
    return {name: found[name] for name in ("packages", "python", "system", "ranks", "git_commit")}


def control(examples: Sequence[Example], k: int, annotator: str) -> dict[str, Any]:
    """A rule without a model, measured as the systems are: it copies the user's last queries."""
    rule = copy_last(k)
    rows = [
        {"id": example.id, "response": "\n".join(rule(example)), "finished": True, "tokens": None}
        for example in examples
    ]
    scored = score_rows(examples, rows, load_annotator(annotator))
    users = [example.user_id for example in examples]

    def interval(values: np.ndarray, of: Sequence[str]) -> list[Any]:
        return estimate_means(values, of, RESAMPLES, seed=0)

    return summarise(measure_table(examples, scored, k), scored, users, interval, k)


def answers(folder: Path, examples: Sequence[Example]) -> list[dict[str, Any]]:
    """Of test users, one example each: the history, the logged next queries, and what each system writes greedily."""
    first: dict[str, Example] = {}
    for example in examples:
        first.setdefault(example.user_id, example)
    chosen = list(first.values())[:: max(1, len(first) // SHOWN)][:SHOWN]
    written = {
        system: {row["id"]: row["response"] for _, row in read_jsonl(folder / "generations" / f"{system}_greedy.jsonl")}
        for system in ("base", "sft", "tppo")
    }
    return [
        {
            "history": [event.text for event in example.history],
            "gold": list(example.targets),
            **{system: texts[example.id].split("\n") for system, texts in written.items()},
        }
        for example in chosen
    ]


def draw(records: Mapping[str, Any], path: Path) -> None:
    """Step 1's perplexity on held-out users, then step 3's curves; a line a run."""
    figure, axes = plt.subplots(1, 1 + len(CURVES), figsize=(3.2 * (1 + len(CURVES)), 3), layout="constrained")
    for name, record in records.items():
        rows = record["step1"]
        axes[0].plot([row["epoch"] for row in rows], [row["eval_perplexity"] for row in rows], "o-", label=name)
        for axis, curve in zip(axes[1:], CURVES, strict=True):
            axis.plot([row["step"] for row in record["step3"]], [row[curve] for row in record["step3"]], label=name)
    axes[0].set(title="step 1: dev perplexity", xlabel="epoch")
    for axis, title in zip(axes[1:], CURVES.values(), strict=True):
        axis.set(title=title, xlabel="rollout of step 3")
    axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def page(records: Mapping[str, Any]) -> str:
    """The page in Markdown."""
    parts = [
        "# Pretrained models on real logs",
        "From the log to the report with `bash scripts/run_all.sh --model ... --reward_model ... --log ...`, on CPU "
        "ranks. One seed each, as measured; brackets are 95 % intervals over test users. Made by `python -m "
        "study.pretrained` from the runs' folders; the numbers are in [pretrained.json](pretrained.json).",
        "Three cautions. The judge is the lexical annotator, which knows the user's real next queries and has labeled "
        "what the reward model learned from. Relevance alone is not enough: a rule that copies the user's last queries "
        "is the most relevant of all, and suggests nothing new (*copied*). And a run has few rollouts: it shows that "
        "rewards move a pretrained model, not how far they can.",
        f"![curves]({FIGURE_NAME})",
    ]
    for name, record in records.items():
        parts += run_section(name, record)
    return "\n\n".join(parts) + "\n"


def run_section(name: str, record: Mapping[str, Any]) -> list[str]:
    """A run's tables."""
    settings, seconds, rollouts = record["settings"], record["seconds"], record["step3"]
    counts = ", ".join(f"{split} {rows} of {users} users" for split, (rows, users) in record["examples"].items())
    spent = ", ".join(f"{stage} {value / 60:.1f}" for stage, value in seconds.items())
    first, last = (record["step1"][place]["eval_perplexity"] for place in (0, -1))
    kl = np.mean([row["kl/per_sequence"] for row in rollouts[-LAST:]])
    reward = ", ".join(f"{metric} {record['step2'][metric]:.3f}" for metric in REWARD_METRICS)
    return [
        f"## {name}",
        f"Model {settings['model']}, reward model {settings['reward_model']}, annotator and judge "
        f"{settings['annotator']}, seed {settings['seed']}; {record['machine']['ranks']} ranks. Examples: {counts}. "
        f"Minutes: {sum(seconds.values()) / 60:.0f} ({spent})." + (f" {record['note']}" if record["note"] else ""),
        f"**Step 1**: dev perplexity of the responses from {first:.1f} (base model) to {last:.1f}.",
        f"**Step 2**, on held-out users: {reward}.",
        f"**Step 3**: {len(rollouts)} rollouts, {np.median([row['seconds/step'] for row in rollouts]):.0f} s each "
        f"(median); the KL to SFT in the last {LAST} is {kl:.2f} nats a response.",
        systems_table(record, f"sampled at {record['decoding']['temperature']:g}"),
        systems_table(record, "greedy"),
        differences(record),
        *[f"> {warning}" for warning in record["warnings"]],
        *answer_section(record["answers"]),
    ]


def systems_table(record: Mapping[str, Any], decoding: str) -> str:
    """A row a system, a control, and the log."""
    found = {
        system: values["greedy"] if decoding == "greedy" else values for system, values in record["systems"].items()
    } | {"copy": record["copy"], "gold": record["gold"]}
    rows = [
        [NAMES.get(system, system), *(
            format_estimate(values[measure]) if measure == "relevance_rate" else number(values[measure]["value"])
            for measure in MEASURES
        )]
        for system, values in found.items()
    ]  # fmt: skip
    return table([decoding, *MEASURES.values()], rows)


def differences(record: Mapping[str, Any]) -> str:
    """Each system less an earlier one, with intervals over users."""
    rows = []
    for pair, found in record["comparisons"].items():
        later, earlier = pair.split("_vs_")
        for decoding, of in (("sampled", found), ("greedy", found["greedy"])):
            changes = [format_estimate(of["differences"][measure], signed=True) for measure in MEASURES]
            rows.append([f"{NAMES[later]} - {NAMES[earlier]}, {decoding}", *changes])
    return table(["difference", *MEASURES.values()], rows)


def answer_section(shown: Sequence[Mapping[str, Any]]) -> list[str]:
    """What each system writes, greedily."""
    if not shown:
        return []
    parts = [f"### What they write, greedily, for {len(shown)} test users"]
    for place, answer in enumerate(shown, start=1):
        columns = ("gold", "base", "sft", "tppo")
        cells = [cell(answer[column]) for column in columns]
        parts.append(f"{place}. History: " + " · ".join(escape(text) for text in answer["history"][-5:]))
        parts.append(table([NAMES[column] for column in columns], [cells]))
    return parts


def cell(lines: Sequence[str]) -> str:
    """The first lines of an answer; the base model writes on until its budget is spent."""
    more = [f"*{len(lines) - SHOWN_LINES} more lines*"] if len(lines) > SHOWN_LINES else []
    return "<br>".join([*map(escape, lines[:SHOWN_LINES]), *more])


if __name__ == "__main__":
    run_command(main)
