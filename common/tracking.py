"""What a run records while it runs: TensorBoard, and the same scalars in a JSONL file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from common.access import naming
from common.files import atomic_write, read_jsonl
from common.private import MODE, only_mine
from common.progress import is_main_process


class StepFile:
    """Appends JSON objects that each belong to a step; a resumed run first cuts off what lies past its checkpoint.

    `private`: others may not read it.
    """

    def __init__(self, path: str | Path, first_step: int = 0, private: bool = False) -> None:
        self.path = Path(path)
        self._private = private
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self._keep_steps_below(first_step)

    def append(self, step: int, row: Mapping[str, Any]) -> None:
        """Write and flush one line."""
        opener = only_mine if self._private else None
        with naming(self.path), open(self.path, "a", encoding="utf-8", opener=opener) as stream:
            stream.write(json.dumps({"step": step, **row}) + "\n")

    def _keep_steps_below(self, first_step: int) -> None:
        whole_lines = [line for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True) if "\n" in line]
        with atomic_write(self.path, self._private) as stream:
            stream.writelines(line for line in whole_lines if json.loads(line)["step"] < first_step)


class MetricsFile(StepFile):
    """One line of numbers a step."""

    def append(self, step: int, values: Mapping[str, float | Sequence[float]]) -> None:
        """Write and flush one line of numbers or lists of them; a number that is NaN or infinite is written as null."""
        row = {
            key: value if isinstance(value, Sequence) or abs(value) < float("inf") else None
            for key, value in values.items()
        }
        super().append(step, row)


class Tracker:
    """Scalars and images of a run under `output_dir`: `tensorboard/`, `metrics.jsonl`, and `profiles.jsonl` for what is
    measured along a response. Silent off rank 0.

    `layout` groups scalars in TensorBoard's tab "Custom scalars", in the form of `SummaryWriter.add_custom_scalars`.
    """

    def __init__(
        self,
        output_dir: str | Path,
        *,
        tensorboard: bool,
        first_step: int = 0,
        layout: Mapping[str, Mapping[str, Sequence[Any]]] | None = None,
    ) -> None:
        self._metrics: MetricsFile | None = None
        self._profiles: MetricsFile | None = None
        self._writer: SummaryWriter | None = None
        self._folder = Path(output_dir) / "tensorboard"
        if not is_main_process():
            return
        self._metrics = MetricsFile(Path(output_dir) / "metrics.jsonl", first_step)
        self._profiles = MetricsFile(Path(output_dir) / "profiles.jsonl", first_step)
        if tensorboard:
            # purge_step hides the points that a killed run wrote after the checkpoint we resume from.
            self._writer = SummaryWriter(str(self._folder), purge_step=first_step or None)
            # Images show responses, and TensorBoard's own files take the umask.
            self._writer.flush()
            for events in self._folder.glob("events.out.tfevents.*"):
                events.chmod(MODE)
            if layout:
                self._writer.add_custom_scalars(layout)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Log `values` at `step`; a key's part before `/` groups it in TensorBoard."""
        if self._metrics is not None:
            self._metrics.append(step, values)
        if self._writer is not None:
            with naming(self._folder):
                for key, value in values.items():
                    self._writer.add_scalar(key, value, step)

    def profiles(self, step: int, values: Mapping[str, Sequence[float]]) -> None:
        """Log lists that run along the places of a response."""
        if self._profiles is not None:
            self._profiles.append(step, values)

    def image(self, step: int, tag: str, draw: Callable[[], np.ndarray]) -> None:
        """Log the image that `draw` makes, (height, width, 3) of bytes; it is drawn only where one is kept."""
        if self._writer is not None:
            with naming(self._folder):
                self._writer.add_image(tag, draw(), step, dataformats="HWC")

    def close(self) -> None:
        """Flush and close the event file."""
        if self._writer is not None:
            with naming(self._folder):
                self._writer.close()


class JsonlCallback(TrainerCallback):
    """Writes what `transformers.Trainer` logs to a `MetricsFile`, so that all three steps leave one."""

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._file: MetricsFile | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the file; a resumed run cuts off what lies past its checkpoint."""
        if state.is_world_process_zero:
            self._file = MetricsFile(self._path, first_step=state.global_step + 1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append the numbers among `logs`."""
        if self._file is not None and logs:
            numbers = {key: float(value) for key, value in logs.items() if isinstance(value, int | float)}
            self._file.append(state.global_step, numbers)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """All rows of a metrics file, in order."""
    return [row for _, row in read_jsonl(path)]
