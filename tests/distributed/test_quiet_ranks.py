"""What steps 1 and 3 print on two ranks: the lines that are allowed here, and no other."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.distributed.test_step1_ranks import arguments
from tests.distributed.test_step1_ranks import inputs as step1_inputs  # noqa: F401
from tests.step3.runs import command, environment, write_inputs

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

BAR = r" *([\w :.-]+: +)?\d+%\|.*\| \d+/\d+ \[.*\] *"
ALLOWED = {
    1: [
        BAR,
        r"(train|dev): \d+ examples; \d+ left out, over \d+ response tokens",
        r"starting from \S+",
        r"\{'(eval_|train_)?(loss|runtime)': .*\}",  # a point of the curves
        r"(model|metrics|tensorboard|next): .*",
    ],
    3: [
        BAR,
        r"memory plan: .*",
        r"rollout weights: .*",
        r"warning: no response has ended in the rollout of step 0: .*",  # of 8 tokens, by a random model
        r"step 3 took \d+ s",
        r"  (tuned model|critic|checkpoints|metrics|report|TensorBoard)  .*",
        r"(try it|next): .*",
    ],
}


def unexpected(step: int, flags: Sequence[str]) -> list[str]:
    """The lines that a run of the step's script prints and that are not allowed."""
    script = ["bash", f"scripts/run_step{step}.sh", "--preset", "none", "--num_gpus", "2", *flags]
    settings = environment() | {"TPPO_VENV": "none"}
    ended = subprocess.run(
        script, env=settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stdout[-3000:]
    # A bar goes back to the beginning of its line, moves the cursor to its place, and may be cut by a message.
    text = re.sub(r"\x1b\[A", "", ended.stdout)
    lines = [line for line in re.split(r"[\r\n]+", text) if line.strip()]
    assert any(re.fullmatch(BAR, line) for line in lines), "the output was not seen"
    return [line for line in lines if not any(re.fullmatch(allowed, line) for allowed in ALLOWED[step])]


@pytest.mark.parametrize(
    "flags", [("--zero_stage=3", "--lora_r=4"), ("--zero_stage=2", "--dtype=bf16", "--gradient_checkpointing")]
)
def test_step_1_with_accumulation(flags: Sequence[str], step1_inputs: Path, tmp_path: Path) -> None:  # noqa: F811
    batches = ("--per_device_train_batch_size=1", "--gradient_accumulation_steps=2")
    assert unexpected(1, arguments(step1_inputs, tmp_path / "run", *batches, *flags)) == []


def test_step_3_with_adapters(tmp_path: Path) -> None:
    run = command(write_inputs(tmp_path), tmp_path / "run", "--lora_r", "4", "--zero_stage", "2", "--dtype", "bf16")
    assert unexpected(3, run[run.index("step3_tppo/main.py") + 1 :]) == []
