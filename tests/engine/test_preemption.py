"""A scheduler's signal: the run saves, ends with the status that means "again", and goes on as if nothing had been."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from common.engine.checkpoint import list_checkpoints
from common.engine.preemption import Preemption
from common.errors import REQUEUE
from tests.distributed.ranks import run_on_ranks
from tests.step3.runs import assert_equal_runs, command, environment, numbers, run_successfully, write_inputs

FLAGS = ("--total_steps", "20", "--save_steps", "100")


def _signalled(rank: int, world_size: int) -> tuple[bool, bool, bool]:
    before = signal.getsignal(signal.SIGTERM)
    with Preemption() as preemption:
        calm = preemption.requested()
        if rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        asked = preemption.requested()
    return calm, asked, signal.getsignal(signal.SIGTERM) is before


def test_one_signalled_rank_stops_all() -> None:
    assert run_on_ranks(_signalled, 2) == [(False, True, True)] * 2


@pytest.mark.distributed
@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_the_script_saves_and_asks_to_be_queued_again(number: signal.Signals, tmp_path: Path) -> None:
    """`run_step3.sh`, the pipeline and the launcher hand the signal on to the ranks, and their status back."""
    inputs = write_inputs(tmp_path / "inputs")
    straight, output = tmp_path / "straight", tmp_path / "run"
    run_successfully(inputs, straight, *FLAGS)
    launch = command(inputs, output, *FLAGS)
    flags = launch[launch.index("step3_tppo/main.py") + 1 :]
    script = ["bash", "scripts/run_step3.sh", "--preset", "none", "--num_gpus", "2", *flags]
    process = subprocess.Popen(
        script, env=environment() | {"TPPO_VENV": "none"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    metrics = output / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not metrics.is_file() or len(metrics.read_text().splitlines()) < 3:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.02)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == REQUEUE, printed
    assert "stopped: asked to by a signal; saved after step" in printed
    (saved,) = list_checkpoints(output / "checkpoints")
    assert 3 <= int(saved.name[-8:]) < 20
    run_successfully(inputs, output, *FLAGS, "--resume")
    assert_equal_runs(output, straight)
    assert [row["step"] for row in numbers(output)] == list(range(20))
