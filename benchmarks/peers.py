"""What the scripts share that measure other projects' trainers, each in a process of its own.

Nothing of DeepSpeed is imported here: it would count as their memory.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

# Of every peer's training arguments: fp32 on the CPU, and nothing that takes time beside the steps.
PLAIN = {
    "report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "save_strategy": "no",
    "disable_tqdm": True, "logging_steps": 1000,
}  # fmt: skip


class StepClock(TrainerCallback):
    """Seconds from the beginning of each optimizer step to the next one's."""

    def __init__(self) -> None:
        self._marks: list[float] = []

    @property
    def seconds(self) -> list[float]:
        """Of each step that has ended."""
        return [after - before for before, after in pairwise(self._marks)]

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """The first mark."""
        self._marks.append(time.perf_counter())

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """The end of a step."""
        self._marks.append(time.perf_counter())


def peer_options(*numbers: str) -> argparse.Namespace:
    """The arguments that `benchmarks.measuring.peer` gives a script; `numbers` are the names of further ones."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    for name in ("steps", "batch", *numbers):
        parser.add_argument(f"--{name}", type=int, required=True)
    return parser.parse_args()


def print_steps(options: argparse.Namespace, make_trainer: Callable[[dict[str, Any]], Trainer]) -> None:
    """Train, then print the seconds of each step and the most memory of this process as JSON.

    `make_trainer` makes a trainer from the arguments that all peers have in common.
    """
    clock = StepClock()
    with tempfile.TemporaryDirectory() as output:
        trainer = make_trainer(
            {"output_dir": output, "max_steps": options.steps, "per_device_train_batch_size": options.batch, **PLAIN}
        )
        trainer.add_callback(clock)
        trainer.train()
    print(json.dumps({"seconds": clock.seconds, "peak_mib": round(peak_memory() / 2**20)}))


def peak_memory() -> int:
    """The most bytes that this process has held: on its GPU, or of the host's memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])
