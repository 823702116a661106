"""How long the study takes, by what jobs of each kind took before."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

from common.files import read_json, write_json
from study.jobs import Job

# The flags that say how much work a job is; jobs that differ in others alone take the same time.
SIZES = (
    "--num_users", "--num_queries", "--max_prompt_tokens", "--max_train_examples", "--num_train_epochs",
    "--total_steps", "--ppo_epochs", "--split", "--control",
)  # fmt: skip


def kind(job: Job) -> str:
    """Jobs of one kind take about as long: the modules that they run, and how much of it."""
    sizes = {
        f"{flag[2:]} {value}": None
        for _, flags in job.commands
        for flag, value in pairwise(flags)
        if flag in SIZES
    }
    modules = " + ".join(module for module, _ in job.commands)
    return f"{modules} ({', '.join(sizes)})" if sizes else modules


class Timings:
    """Seconds of all jobs that were made, by kind, in one JSON file: `{kind: [seconds, ...]}`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seconds: dict[str, list[float]] = read_json(path) if path.is_file() else {}

    def add(self, job: Job, seconds: float) -> None:
        """Keep what a job took."""
        self._seconds.setdefault(kind(job), []).append(round(seconds, 1))
        write_json(self._path, dict(sorted(self._seconds.items())))

    def expected(self, kind_name: str) -> float | None:
        """The median seconds of a kind; None if no such job has been timed."""
        seconds = self._seconds.get(kind_name)
        return statistics.median(seconds) if seconds else None

    def hours(self, jobs: Iterable[Job], workers: int) -> tuple[float, int]:
        """Hours of all `jobs`, with `workers` always busy, and the number of jobs whose kind has not been timed."""
        expected = [self.expected(kind(job)) for job in jobs]
        return sum(seconds for seconds in expected if seconds is not None) / 3600 / workers, expected.count(None)

    def summary(self, jobs: Sequence[Job], workers: int) -> str:
        """`40 jobs, about 5.1 hours with 2 at a time`, and what that leaves out."""
        hours, unknown = self.hours(jobs, workers)
        if unknown and not hours:
            return f"{len(jobs)} jobs, of kinds that were never timed"
        left_out = f", not counting {unknown} of kinds that were never timed" if unknown else ""
        return f"{len(jobs)} jobs, about {hours:.1f} hours with {workers} at a time{left_out}"

    def table(self, jobs: Iterable[Job]) -> list[str]:
        """A line a kind: how many jobs, the seconds of one, and the hours on one core of all."""
        lines = ["jobs  seconds  hours  kind"]
        for name, count in Counter(map(kind, jobs)).items():
            seconds = self.expected(name)
            shown = "      ?      ?" if seconds is None else f"{seconds:7.0f}  {seconds * count / 3600:5.2f}"
            lines.append(f"{count:4d}  {shown}  {name}")
        return lines
