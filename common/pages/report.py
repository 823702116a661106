"""The page of a run: warnings first, then results, curves, and its best and worst answers.

    python -m common.pages.report --run outputs/demo

writes outputs/demo/report.html, one file without scripts that fetches nothing. `--run` may also be step 3's own folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from common.config import option, parse_config
from common.errors import InputError, run_command
from common.evaluation.over_optimisation import WINDOW
from common.evaluation.report import format_estimate, report_tables, setting
from common.files import atomic_write
from common.pages.charts import DrawnChart, draw_chart
from common.pages.findings import (
    Finding,
    comparable,
    ends,
    evaluation_findings,
    judge_findings,
    run_findings,
    unchecked,
    values_of,
)
from common.pages.render import render, signed
from common.pages.run_folder import RunFolder, read_run
from common.pages.samples import LEGEND, Sample
from common.pages.sections import QUESTIONS, STEP1, STEP2, Chart

PAGE_NAME = "report.html"
SHOWN = 3  # examples of each kind
NEWEST_STEPS = 3  # sampled steps that examples are taken from: the policy as it is now


@dataclass
class ReportConfig:
    """Make report.html of a run."""

    run: str = option("", "Folder of a run (scripts/run_all.sh), or step 3's output folder; report.html goes there.")


class Section(NamedTuple):
    """Charts under a heading."""

    title: str
    charts: list[DrawnChart]


class Examples(NamedTuple):
    """Sampled responses under a heading, and why they are shown."""

    title: str
    why: str
    samples: list[Sample]


def main() -> None:
    """The command."""
    config = parse_config(ReportConfig)
    if not config.run:
        raise InputError("--run is missing: the folder of a run, such as outputs/demo")
    print(f"page: {write_report(config.run)}")


def write_report(run: str | Path) -> Path:
    """Write `report.html` into the folder `run`; returns its path. Raises `InputError` for a folder that is no run."""
    folder = read_run(run)
    path = folder.path / PAGE_NAME
    with atomic_write(path) as stream:
        stream.write(report_page(folder))
    return path


def report_page(run: RunFolder) -> str:
    """The text of the page."""
    return render(
        "report.html",
        run=run,
        findings=find_all(run),
        comparable=comparable(run.step3),
        unchecked=unchecked(run.step3) if run.step3 else [],
        window=WINDOW,
        key_numbers=key_numbers(run),
        setting=setting(run.evaluation) if run.evaluation else "",
        tables=report_tables(run.evaluation) if run.evaluation else [],
        sections=[Section(question, _drawn(charts, run.step3)) for question, charts in QUESTIONS.items()],
        step1=_drawn(STEP1, run.step1),
        step2=_drawn(STEP2, run.step2),
        examples=choose_examples(run.samples),
        legend_values=LEGEND,
    )


def find_all(run: RunFolder) -> list[Finding]:
    """All warnings, those that put the others in doubt first."""
    if not run.evaluation:
        return run_findings(run.step3)
    judges = {"held-out users": run.evaluation["annotator"]}
    if run.settings:
        judges["the rollouts"] = run.settings["monitor"]
    doubts = judge_findings(judges, run.evaluation["settings"]["reward_annotator"])
    return doubts + run_findings(run.step3) + evaluation_findings(run.evaluation)


def key_numbers(run: RunFolder) -> list[tuple[str, str]]:
    """Names and values of what a reader wants first."""
    numbers: list[tuple[str, str]] = []
    if run.evaluation:
        decoding = run.evaluation["decoding"]["main"]
        numbers += [
            (f"relevance of {name}, {decoding}", format_estimate(metrics["relevance_rate"]))
            for name, metrics in run.evaluation["systems"].items()
        ]
    if run.step3:
        reward, kl = ends(run.step3, "reward/score_per_response"), values_of(run.step3, "kl/per_sequence")
        if reward:
            numbers.append(("reward a response, first and last 10 steps", " to ".join(map(signed, reward))))
        if kl:
            numbers.append(("KL to the reference, last step", f"{kl[-1]:.2f} nats"))
        numbers.append(("steps of TPPO", str(len(run.step3))))
    return numbers


def choose_examples(samples: Sequence[Sample]) -> list[Examples]:
    """Best and worst of the newest samples: by the judge where there is one, then by reward. And, with a judge, those
    that were paid most although it calls none of their queries relevant."""
    steps = sorted({sample.step for sample in samples})[-NEWEST_STEPS:]
    newest = [sample for sample in samples if sample.step in steps]
    ranked = sorted(newest, key=lambda sample: (sample.relevant or 0, sample.reward), reverse=True)
    shown = min(SHOWN, len(ranked) // 2)
    if not shown:
        return [Examples("Sampled answers", "All there are.", ranked)] if ranked else []
    judged = any(sample.verdict for sample in newest)
    order = "by the judge, then by reward" if judged else "by reward"
    of_steps = f"steps {', '.join(map(str, steps))}"
    found = [
        Examples("Best", f"{order}, of {of_steps}", ranked[:shown]),
        Examples("Worst", f"{order}, of {of_steps}", ranked[: -shown - 1 : -1]),
    ]
    overpaid = [sample for sample in newest if sample.relevant == 0 and sample.reward > 0]
    if overpaid:
        overpaid.sort(key=lambda sample: -sample.reward)
        why = "a positive reward although the judge calls no query relevant: what a hacked reward looks like"
        found.append(Examples("Paid for nothing", why, overpaid[:SHOWN]))
    return found


def _drawn(charts: Sequence[Chart], rows: Sequence[dict[str, Any]]) -> list[DrawnChart]:
    return [drawn for chart in charts if (drawn := draw_chart(chart, rows)) is not None]


if __name__ == "__main__":
    run_command(main)
