"""The settings that steps 1 and 2 share because both train with `transformers.Trainer`."""

from __future__ import annotations

from dataclasses import dataclass

from common.config import HANG_TIMEOUT, ModelOptions, OptimizerOptions, RunOptions, ZeroOptions, option
from common.errors import InputError


@dataclass
class TrainerOptions(ZeroOptions, OptimizerOptions, ModelOptions, RunOptions):
    """How a Trainer trains; a step's own config gives other defaults where it needs them."""

    learning_rate: float = option(2e-5, "Peak learning rate of AdamW.", group="training", above=0)
    num_train_epochs: float = option(2.0, "Passes over the training data (paper: 2).", above=0)
    max_steps: int = option(0, "Stop after this many optimiser steps; 0 goes by num_train_epochs.")
    per_device_train_batch_size: int = option(4, "Sequences a rank and a micro-batch.", minimum=1)
    per_device_eval_batch_size: int = option(8, "Sequences a rank in evaluation.", minimum=1)
    gradient_accumulation_steps: int = option(1, "Micro-batches an optimiser step.", minimum=1)
    warmup_ratio: float = option(0.03, "Share of the steps in which the learning rate rises.", below=1)
    lr_scheduler_type: str = option(
        "cosine", "How the learning rate falls.", choices=["cosine", "linear", "constant_with_warmup"]
    )
    weight_decay: float = option(0.0, "AdamW's decoupled weight decay.")
    max_grad_norm: float = option(1.0, "Gradients are scaled down to this norm.")
    logging_steps: int = option(
        10, "Steps between two points of the training curves.", group="logging, evaluation, checkpoints", minimum=1,
    )
    eval_steps: int = option(
        200, "Steps between two evaluations on held-out users; there is one at the end.", minimum=1
    )
    save_steps: int = option(200, "Steps between two checkpoints; there is one at the end.", minimum=1)
    hang_timeout: float = option(
        HANG_TIMEOUT,
        "End the job when a rank makes no progress within a step or checkpoint for so many seconds; 0: never.",
    )
    save_total_limit: int = option(2, "Checkpoints kept; 2 or more, so that one is whole while the next is written.")


def check_trainer_options(options: TrainerOptions) -> None:
    """Raise `InputError` for settings that cannot work, before anything is loaded."""
    if options.save_total_limit < 2:
        raise InputError("--save_total_limit must be 2 or more: a kill during a save would leave no checkpoint")
