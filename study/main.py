"""The study: does a reward at every token hold what it promises? Runs every comparison and writes the results.

    bash scripts/reproduce.sh                 the whole study (hours)
    bash scripts/reproduce.sh --quick         a sketch of it with the same code
    bash scripts/reproduce.sh --forecast      how long it would take, by kinds of jobs

It goes on where it stopped: what left a record is not run again, unless the settings that led to it have changed.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.access import check_writable
from common.config import option, parse_config
from common.errors import InputError, run_command
from common.files import read_json, write_json
from study.forecast import Timings
from study.jobs import Job, JobRunner, StudyFailed, fingerprints, needed_jobs
from study.parts import Chosen, axis_jobs, budget_jobs, main_jobs, real_jobs, search_jobs
from study.plan import Planner
from study.records import Records, leaves_record
from study.report import write_results
from study.search import choose
from study.settings import FULL, QUICK, Scale

SHIPPED = Path("docs/results")  # what the full study found, and what its jobs took
CHOSEN_NAME = "search.json"
SECONDS_NAME = "seconds.json"
PARTS = ("main", "budgets", "axes", "real")


@dataclass
class StudyConfig:
    """Run the study on the embedded log (and on real ones), then write its tables and figures."""

    quick: bool = option(False, "A sketch: few users, two seeds, the settings that the full search chose.")
    work_dir: str = option("", "Where models and samples lie (default: outputs/study or outputs/study_quick).")
    results_dir: str = option("", "Where records, tables and figures go (default: docs/results, or work_dir if quick).")
    real_log: list[str] = option([], "Real search logs for the part 'real'; none leaves it out.")
    parts: list[str] = option(list(PARTS), f"Which parts to run: {', '.join(PARTS)}; the search comes first.")
    workers: int = option(2, "Jobs at a time; give each a core.", minimum=1)
    forecast: bool = option(False, "Say how long it would take, by what such jobs took before; run nothing.")
    report_only: bool = option(False, "Write tables and figures from the records that are there; run nothing.")


def main() -> None:
    """Search, then run everything else, then report."""
    config = parse_config(StudyConfig)
    unknown = set(config.parts) - set(PARTS)
    if unknown:
        raise InputError(f"--parts {', '.join(sorted(unknown))}: none of {', '.join(PARTS)}")
    scale = QUICK if config.quick else FULL
    work = Path(config.work_dir or ("outputs/study_quick" if config.quick else "outputs/study"))
    results = Path(config.results_dir or (work / "results" if config.quick else SHIPPED))
    study = Study(work, results, config.workers, scale, tuple(config.real_log))
    if config.forecast:
        study.forecast(lambda planner: _plan_all(planner, config, scale))
        return
    check_writable(results, "give another --results_dir")
    if not config.report_only:
        check_writable(work, "give another --work_dir")
        chosen = study.search() if scale.search else shipped_settings()
        study.run(lambda planner: _plan(planner, config, scale, chosen))
    write_results(results)
    print(f"results: {results}/README.md, {results}/reproduction.json")
    print("next: read the first: whether the goal is reached, then the tables")


def shipped_settings() -> Chosen:
    """What the full study's search has chosen."""
    return read_json(SHIPPED / CHOSEN_NAME)["chosen"]


def _plan_all(planner: Planner, config: StudyConfig, scale: Scale) -> None:
    if scale.search:
        search_jobs(planner)
    _plan(planner, config, scale, shipped_settings())


def _plan(planner: Planner, config: StudyConfig, scale: Scale, chosen: Chosen) -> None:
    parts: dict[str, Callable[..., None]] = {"main": main_jobs, "budgets": budget_jobs}
    if scale.axes:
        parts["axes"] = axis_jobs
    if config.real_log:
        parts["real"] = real_jobs
    for name, add in parts.items():
        if name in config.parts:
            add(planner, scale, chosen)


class Study:
    """Runs planned jobs and keeps their records; prints one line for each job that ends."""

    def __init__(self, work: Path, results: Path, workers: int, scale: Scale, real_logs: tuple[str, ...]) -> None:
        self._work = work
        self._scale = scale
        self._real_logs = real_logs
        self._results = results
        self._records = Records(results / "records")
        self._timings = Timings(results / SECONDS_NAME)
        self._workers = workers
        self._runner = JobRunner(work, workers, self._finish)
        self._marks: dict[str, str] = {}
        self._left = 0
        self._begun = time.monotonic()
        self._ended = 0

    def search(self) -> Chosen:
        """Each arm's settings, from the search's records."""
        self.run(search_jobs)
        found = choose(dict(self._records.read()))
        write_json(self._results / CHOSEN_NAME, found)
        return found["chosen"]

    def run(self, plan: Callable[[Planner], None]) -> None:
        """Run what `plan` adds, as far as no record of it is there."""
        planned = self._planned(plan)
        marks = self._marks = fingerprints(planned)
        jobs = self._left_of(planned, marks)
        if jobs:
            print(self._timings.summary(jobs, self._workers), flush=True)
        self._left, self._ended, self._begun = len(jobs), 0, time.monotonic()
        self._runner.run(jobs, marks)

    def forecast(self, plan: Callable[[Planner], None]) -> None:
        """Print how long all that `plan` adds takes, and how long what is left of it."""
        planned = self._planned(plan)
        print(*self._timings.table(planned), sep="\n")
        for name, jobs in (("all", planned), ("left", self._left_of(planned, fingerprints(planned)))):
            print(f"{name}: {self._timings.summary(jobs, self._workers)}")

    def _planned(self, plan: Callable[[Planner], None]) -> list[Job]:
        planner = Planner(self._work, self._scale, self._real_logs)
        plan(planner)
        return list(planner.jobs.values())

    def _left_of(self, planned: list[Job], marks: Mapping[str, str]) -> list[Job]:
        def unrecorded(job: Job) -> bool:
            return leaves_record(job) and not self._records.has(job, marks[job.name])

        # A record may be lost, or its study killed before it was written: a whole folder alone is not enough.
        return needed_jobs(
            planned,
            wanted=unrecorded,
            done=lambda job: self._runner.is_done(job, marks[job.name]) and not unrecorded(job),
        )

    def _finish(self, job: Job, seconds: float) -> None:
        folder = self._work / job.name
        self._timings.add(job, seconds)
        record = self._records.write(job, folder, seconds, self._marks[job.name])
        for leftover in job.leftovers:
            shutil.rmtree(folder / leftover, ignore_errors=True)
        self._left -= 1
        self._ended += 1
        remaining = (time.monotonic() - self._begun) / self._ended * self._left / 60
        print(f"{job.name:<34} {seconds:5.0f} s  {_summary(record):<48} {self._left} left, about {remaining:.0f} min",
              flush=True)  # fmt: skip


def _summary(record: dict[str, Any] | None) -> str:
    """The numbers of a record that tell whether its run went well."""
    if record is None:
        return ""
    if "metrics" in record:
        shown = {name: record["metrics"].get(name) for name in ("word_auc", "sentence_auc")}
        return "  ".join(f"{name} {value:.3f}" for name, value in shown.items() if value is not None)
    decodings = {name: next(iter(judges.values())) for name, judges in record["decodings"].items()}
    shares = [f"{name} {judged['means']['relevance_rate']:.3f}" for name, judged in decodings.items()]
    return "  ".join(["relevance", *shares, *([] if record["kl"] is None else [f"KL {record['kl']:.2f}"])])


def command() -> None:
    """`main`, with a failed study told in one line."""
    try:
        main()
    except StudyFailed as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    run_command(command)
