"""What a run has left on disk for a report, and what it has not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import InputError
from common.files import RUN_CONFIG_NAME, read_json
from common.pages.samples import SAMPLES_NAME, Sample, read_samples
from common.tracking import read_metrics

STEP1, STEP2, STEP3 = "step1_sft", "step2_token_reward/reward", "step3_tppo"
METRICS_NAME = "metrics.jsonl"
EVALUATION_NAME = "report.json"
ALONE_EVALUATION_NAME = "evaluation/report.json"  # where step 3's last words have scripts/evaluate.sh write

Rows = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class RunFolder:
    """A run's metrics by step (empty: none), samples, report.json and settings of step 3 (None: absent).
    `missing` says what is absent."""

    path: Path
    step1: Rows
    step2: Rows
    step3: Rows
    samples: list[Sample]
    evaluation: dict[str, Any] | None
    settings: dict[str, Any] | None
    missing: list[str]


def read_run(path: str | Path) -> RunFolder:
    """Read the folder of a whole run, as scripts/run_all.sh lays it out, or that of step 3 alone.

    Raises `InputError` for a folder that is neither, and for a file in it that is damaged.
    """
    path = Path(path)
    alone = (path / RUN_CONFIG_NAME).is_file() and "reward_path" in read_json(path / RUN_CONFIG_NAME)
    if not alone and not any((path / name).is_dir() for name in (STEP1, STEP2, STEP3)):
        raise InputError(
            f"{path}: no run to report on; give the folder that holds {STEP1} and {STEP3}, or step 3's output folder"
        )
    step3 = path if alone else path / STEP3
    missing: list[str] = []

    def found(file: Path, what: str) -> bool:
        if not file.is_file():
            missing.append(f"{what} ({file})")
        return file.is_file()

    def metrics(folder: Path, what: str) -> Rows:
        file = folder / METRICS_NAME
        return read_metrics(file) if found(file, what) else []

    if alone:
        missing.append("steps 1 and 2: this is a page on step 3 alone; --run takes a whole run too")
    samples, config = step3 / SAMPLES_NAME, step3 / RUN_CONFIG_NAME
    evaluation = path / (ALONE_EVALUATION_NAME if alone else EVALUATION_NAME)
    return RunFolder(
        path=path,
        step1=[] if alone else metrics(path / STEP1, "step 1's metrics"),
        step2=[] if alone else metrics(path / STEP2, "step 2's metrics"),
        step3=metrics(step3, "step 3's metrics"),
        samples=read_samples(samples) if found(samples, "sampled responses of step 3") else [],
        evaluation=read_json(evaluation)
        if found(evaluation, "the comparison on held-out users, by scripts/evaluate.sh") else None,
        settings=read_json(config) if found(config, "step 3's settings") else None,
        missing=missing,
    )  # fmt: skip
