"""The date that chat prompts show: chosen when a run begins, and kept by the run and by the model folder it writes."""

from __future__ import annotations

from datetime import date
from pathlib import Path

from common.engine import distributed
from common.errors import RUN_CONFIG_NAME
from common.files import read_json

DATE_KEY = "prompt_date"


def run_date(output_dir: str | Path, resume: bool) -> date:
    """The day on which the run in `output_dir` began: today, or with `resume` what its settings record.

    A template that was pinned before, in the folder of the model that the run starts from, shows its own date. Call on
    all ranks; one clock counts.
    """
    marker = Path(output_dir) / RUN_CONFIG_NAME
    recorded = read_json(marker).get(DATE_KEY) if resume and marker.is_file() else None
    begun = date.fromisoformat(recorded) if recorded else date.today()
    return distributed.gather_from_ranks(begun)[0]


def date_record(begun: date) -> dict[str, str]:
    """What a run's settings record, for `run_date` to read."""
    return {DATE_KEY: begun.isoformat()}
