"""A step under the deepspeed launcher on two ranks, one of which kills itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.step3.runs import environment, ranks_left


def run_killed(command: str, place: str, call: int, flags: list[str], output: Path) -> int:
    """Run the module `command`, whose rank 1 is killed as `tests.distributed.killed_main` says; the exit status."""
    launch = [
        str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--no_local_rank",
        "--master_port", str(20_000 + os.getpid() % 10_000), "tests/distributed/killed_main.py",
        command, "SIGKILL", place, str(call), "1", *flags,
    ]  # fmt: skip
    ended = subprocess.run(launch, env=environment(), capture_output=True, text=True, timeout=500)
    assert "sends itself SIGKILL" in ended.stderr, ended.stderr[-2000:]  # it did not end for another reason
    assert not (output / "model").exists(), "the run ended before it was killed"
    assert not ranks_left(output), "the launcher left a rank behind"
    return ended.returncode
