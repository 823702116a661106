"""The seconds of each step of a `transformers.Trainer`, for benchmarks of ours and of others."""

from __future__ import annotations

import time
from itertools import pairwise

from transformers import TrainerCallback


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
