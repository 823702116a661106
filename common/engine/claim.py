"""The output folder of a step's run: taken once, by one job, with what a resumed run must find unchanged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common.engine.watchdog import refuse_second_writer
from common.files import claim_output_dir
from common.inputs import step_inputs


def claim_run(
    config: Any, may_differ: frozenset[str], facts: Mapping[str, Any] | None = None,
    splits: Sequence[str] = ("train", "dev"),
) -> Path:  # fmt: skip
    """Make `config.output_dir` the folder of the run with these settings; call on one process, before any work.

    `may_differ` are the settings that may change on a resume, `facts` what is recorded beside the settings for the run
    to read again, `splits` the examples it reads. Raises `InputError` as `refuse_second_writer` and `claim_output_dir`
    do.
    """
    facts = dict(facts or {})
    refuse_second_writer(config.output_dir)
    return claim_output_dir(
        config.output_dir, asdict(config) | facts, resume=config.resume, overwrite=config.overwrite,
        may_differ=may_differ | facts.keys(), inputs=step_inputs(config, splits),
    )  # fmt: skip
