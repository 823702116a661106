"""The processes of stages: signals reach them, and each is recorded once it is done."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from common.files import write_json
from pipeline.stages import Stage

# The launchers hand these on to their ranks, which save and end; see `launch` in scripts/environment.sh.
FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def run_stage(folder: Path, stage: Stage) -> None:
    """Run a stage, and note its seconds in `folder`/stages, unless what it makes is no part of the run.

    A failure ends the command with the stage's own status.
    """
    print(f"== {stage.name}", flush=True)
    begun = time.monotonic()
    if status := run_process(stage.command):
        raise SystemExit(status)
    if stage.recorded:
        write_json(folder / "stages" / f"{stage.name}.json", {stage.name: round(time.monotonic() - begun)})


def run_process(command: Sequence[str]) -> int:
    """The exit status of `command`; signals that arrive meanwhile are its own to handle."""
    process = subprocess.Popen(command)

    def forward(number: int, frame: FrameType | None) -> None:
        process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 128 - status if status < 0 else status  # as a shell counts a process that a signal ended
