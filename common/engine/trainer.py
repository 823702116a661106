"""What steps 1 and 2 add to `transformers.Trainer`: exact resume, no bad checkpoint, curves in the run's folder."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler
from torch.utils.tensorboard import SummaryWriter
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_pt_utils import get_length_grouped_indices
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from common.access import naming
from common.engine import distributed
from common.engine.manifest import is_complete, newest_sound, read_facts, saving, write_manifest
from common.engine.preemption import Preemption
from common.engine.universal import SUFFIX, mend_optimizer, needs_universal
from common.engine.watchdog import Watchdog
from common.errors import InputError, Preempted, TrainingDiverged
from common.tracking import JsonlCallback

_UNIVERSAL = {"load_universal": True}  # DeepSpeed's setting
_UNTOUCHED = "Those before it are untouched: make room, then --resume"


class RecipeTrainer(Trainer):
    """A Trainer whose data order depends on seed and epoch alone, and which stops at a loss that is not finite.

    The library's own length-grouped order comes from the global random state: a resumed run would see other batches,
    and ranks whose states differ would share out different permutations.
    """

    def create_accelerator_and_postprocess(self) -> None:
        """As in the base class, which tells accelerate nothing of gradient accumulation.

        With DeepSpeed accelerate takes the number from DeepSpeed's configuration, and warns of a mismatch of its own.
        """
        super().create_accelerator_and_postprocess()
        if self.is_deepspeed_enabled:
            self.accelerator.gradient_accumulation_steps = self.args.gradient_accumulation_steps

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """As in the base class; raises `TrainingDiverged` for a NaN or infinite loss."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not math.isfinite(loss.item()):
            raise TrainingDiverged(_diverged(f"loss {loss.item()}", self.state.global_step + 1))
        return loss

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """As in the base class; raises `SaveFailed` when the files cannot be written."""
        with saving(f"the checkpoint of step {self.state.global_step}", _UNTOUCHED):
            super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As in the base class, after DeepSpeed has loaded `checkpoint`."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and _reads_universal(self.args):
            (universal,) = Path(checkpoint).glob(f"*{SUFFIX}/")
            mend_optimizer(self.model_wrapped, universal)

    def train(self, *arguments: Any, **settings: Any) -> Any:
        """As in the base class; raises `Preempted`, after a checkpoint, when a scheduler asks the run to stop."""
        with naming(self.args.output_dir), Preemption() as preemption:
            stop = StopWhenAsked(preemption)
            self.add_callback(stop)
            result = super().train(*arguments, **settings)
            self.remove_callback(stop)
        if stop.asked and self.state.global_step < self.state.max_steps:
            raise Preempted(f"saved after step {self.state.global_step}")
        return result

    def whole_weights(self) -> dict[str, torch.Tensor]:
        """The trained model's weights, gathered from all ranks onto rank 0 (empty elsewhere). Call on all ranks."""
        return self.accelerator.get_state_dict(self.model_wrapped) or {}

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        args = self.args
        return LengthGroupedOrder(
            lengths=[len(row["input_ids"]) for row in dataset],
            group_size=args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            seed=args.seed,
            epoch=lambda: int(self.state.epoch or 0),
        )


class LengthGroupedOrder(Sampler[int]):
    """Every index once, those of similar length together, in an order that seed and epoch decide."""

    def __init__(self, lengths: Sequence[int], group_size: int, seed: int, epoch: Callable[[], int]) -> None:
        self._lengths = list(lengths)
        self._group_size = group_size
        self._seed = seed
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self._epoch())
        return iter(get_length_grouped_indices(self._lengths, self._group_size, generator=generator))


class StopWhenAsked(TrainerCallback):
    """Saves and ends the training after the step in which `preemption` was requested."""

    def __init__(self, preemption: Preemption) -> None:
        self._preemption = preemption
        self.asked = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Ask all ranks; one that was signalled is enough."""
        if self._preemption.requested():
            self.asked = control.should_save = control.should_training_stop = True
        return control


class TellPhase(TrainerCallback):
    """Tells the watchdog each step, each batch of an evaluation, and each checkpoint."""

    def __init__(self, watchdog: Watchdog) -> None:
        self._watchdog = watchdog

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A step has begun."""
        self._watchdog.phase("update", state.global_step)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A batch of the evaluation is done."""
        self._watchdog.phase("evaluation", state.global_step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A checkpoint is written; its manifest comes now."""
        self._watchdog.phase("checkpoint", state.global_step)


class CheckpointGuard(TrainerCallback):
    """Lets no diverged state into a checkpoint, and marks the checkpoints that every rank has finished writing."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Log, and so look at loss and gradient norm, before every checkpoint."""
        if control.should_save:
            control.should_log = True
        return control

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Raise `TrainingDiverged` for a value that is NaN or infinite."""
        for name, value in (logs or {}).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise TrainingDiverged(_diverged(f"{name} {value}", state.global_step))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Give the checkpoint its manifest once all ranks have written their parts; without it, it is not complete."""
        with saving(f"the manifest of step {state.global_step}", _UNTOUCHED):
            folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            write_manifest(folder, world_size=args.world_size, sequences_a_step=_sequences_a_step(args))


def newest_checkpoint(folder: str | Path) -> Path | None:
    """The newest checkpoint under `folder` that is complete and undamaged; None without one. Call on all ranks."""
    return newest_sound([path for path in _checkpoints(folder) if is_complete(path)])


def prepare_to_load(checkpoint: Path | None, args: TrainingArguments) -> None:
    """Have DeepSpeed read `checkpoint` in its universal form where another number of ranks wrote it.

    Raises `InputError` where it has no such form, and for another number of sequences an optimiser step: the Trainer
    finds its place in the data by counting steps.
    """
    if checkpoint is None:
        return
    facts, ours = read_facts(checkpoint), _sequences_a_step(args)
    if facts["sequences_a_step"] != ours:
        raise InputError(
            f"{checkpoint} was trained on {facts['sequences_a_step']} sequences an optimiser step, but ranks x "
            "--per_device_train_batch_size x --gradient_accumulation_steps make "
            f"{args.world_size} x {args.per_device_train_batch_size} x {args.gradient_accumulation_steps} = {ours}; "
            "set the two flags so that the product stays"
        )
    if needs_universal(checkpoint, facts["world_size"]):
        args.hf_deepspeed_config.config["checkpoint"] = _UNIVERSAL


def remove_incomplete_checkpoints(folder: str | Path) -> None:
    """Delete what a killed run left half written. Call on one process."""
    for path in _checkpoints(folder):
        if not is_complete(path):
            shutil.rmtree(path)


def checkpoint_step(checkpoint: Path | None) -> int:
    """The optimiser step after which `checkpoint` was taken; 0 for None."""
    return int(checkpoint.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")) if checkpoint else 0


def run_callbacks(
    output_dir: str | Path, *, tensorboard: bool, checkpoint: Path | None, watchdog: Watchdog | None = None
) -> list[TrainerCallback]:
    """The guard, `metrics.jsonl`, and TensorBoard under `output_dir`; what `watchdog`, to be entered around the
    training, is told. Give the Trainer `report_to="none"`."""
    output_dir = Path(output_dir)
    # The watchdog is told first: the guard's manifest is a part of the phase that begins.
    callbacks: list[TrainerCallback] = [TellPhase(watchdog)] if watchdog is not None else []
    callbacks += [CheckpointGuard(), JsonlCallback(output_dir / "metrics.jsonl")]
    if tensorboard and distributed.rank() == 0:
        # purge_step hides the points that a killed run wrote after the checkpoint we resume from.
        first_step = checkpoint_step(checkpoint) + 1
        writer = SummaryWriter(str(output_dir / "tensorboard"), purge_step=first_step if checkpoint else None)
        callbacks.append(TensorBoardCallback(writer))
    return callbacks


def _reads_universal(args: TrainingArguments) -> bool:
    return args.deepspeed is not None and args.hf_deepspeed_config.config.get("checkpoint") == _UNIVERSAL


def _sequences_a_step(args: TrainingArguments) -> int:
    return args.world_size * args.per_device_train_batch_size * args.gradient_accumulation_steps


def _checkpoints(folder: str | Path) -> list[Path]:
    return [Path(path) for path in sort_checkpoints(str(folder))] if Path(folder).is_dir() else []


def _diverged(what: str, step: int) -> str:
    return (
        f"{what} at step {step}. No checkpoint was written since it, those from before are kept (--resume); "
        "lower --learning_rate, raise --warmup_ratio, or look at the data of this step"
    )
