"""The settings that steps 1 and 2 share because both train with `transformers.Trainer`."""

from __future__ import annotations

from dataclasses import dataclass

from common.config import ModelOptions, OptimizerOptions, RunOptions, ZeroOptions, option
from common.errors import InputError


@dataclass
class TrainerOptions(ZeroOptions, OptimizerOptions, ModelOptions, RunOptions):
    """How a Trainer trains; a step's own config gives other defaults where it needs them."""

    learning_rate: float = option(2e-5, "Peak learning rate of AdamW.", group="training")
    num_train_epochs: float = option(2.0, "Passes over the training data (paper: 2).")
    max_steps: int = option(0, "Stop after this many optimiser steps; 0 goes by num_train_epochs.")
    per_device_train_batch_size: int = option(4, "Sequences a rank and a micro-batch.")
    per_device_eval_batch_size: int = option(8, "Sequences a rank in evaluation.")
    gradient_accumulation_steps: int = option(1, "Micro-batches an optimiser step.")
    warmup_ratio: float = option(0.03, "Share of the steps in which the learning rate rises.")
    lr_scheduler_type: str = option(
        "cosine", "How the learning rate falls.", choices=["cosine", "linear", "constant_with_warmup"]
    )
    weight_decay: float = option(0.0, "AdamW's decoupled weight decay.")
    max_grad_norm: float = option(1.0, "Gradients are scaled down to this norm.")
    logging_steps: int = option(
        10, "Steps between two points of the training curves.", group="logging, evaluation, checkpoints",
    )
    eval_steps: int = option(200, "Steps between two evaluations on held-out users; there is one at the end.")
    save_steps: int = option(200, "Steps between two checkpoints; there is one at the end.")
    hang_timeout: float = option(
        1800.0, "End the job when a rank makes no progress within a step or checkpoint for so many seconds; 0: never."
    )
    save_total_limit: int = option(2, "Checkpoints kept; 2 or more, so that one is whole while the next is written.")


def check_trainer_options(options: TrainerOptions) -> None:
    """Raise `InputError` for settings that cannot work, before anything is loaded."""
    for name in (
        "num_train_epochs", "learning_rate", "per_device_train_batch_size", "per_device_eval_batch_size",
        "gradient_accumulation_steps", "logging_steps", "eval_steps", "save_steps",
    ):  # fmt: skip
        if getattr(options, name) <= 0:
            raise InputError(f"--{name} must be above 0, not {getattr(options, name)}")
    for name in ("max_steps", "weight_decay", "max_grad_norm", "hang_timeout"):
        if getattr(options, name) < 0:
            raise InputError(f"--{name} must not be negative, but is {getattr(options, name)}")
    if options.save_total_limit < 2:
        raise InputError("--save_total_limit must be 2 or more: a kill during a save would leave no checkpoint")
    if not 0 <= options.warmup_ratio < 1:
        raise InputError(f"--warmup_ratio is a share of the steps, 0 <= ratio < 1, not {options.warmup_ratio}")
