"""Settings of step 2's training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import TrainingArguments

from common.config import ModelOptions, RunOptions, ZeroOptions, option
from common.engine.deepspeed_config import trainer_deepspeed_config
from common.errors import InputError
from common.models.reward_encoder import RewardInputOptions
from common.models.reward_losses import NUM_CLASSES

# What may change between a run and its continuation.
MAY_DIFFER = frozenset(
    {"resume", "overwrite", "tensorboard", "save_total_limit", "logging_steps", "per_device_eval_batch_size"}
)
_CLASSES = "classes 0 irrelevant, 1 relevant, 2 very relevant"


@dataclass
class Step2Config(ZeroOptions, ModelOptions, RunOptions):
    """Step 2: train the token-level reward model on labelled responses."""

    model_name_or_path: str = option(
        "", "Encoder: a folder or hub name, any model with a token classifier (Longformer in the paper) or step 1's."
    )
    bidirectional: bool = option(False, "Let a decoder read both ways; encoders do so anyway.")
    samples: str = option("", "The labelled responses: samples.jsonl, written by sample.py.")
    labels: str = option("", "Their labels: labels.jsonl, written by label.py.")
    prompt_template: str = option("plain", "How a history is rendered: 'plain', 'compact', or a template file.")
    num_queries: int = option(3, "Queries a response, as the template says it (paper: 3 for AOL).")
    max_prompt_tokens: int = option(512, "Token budget of a history; the oldest events are left out.")
    max_response_tokens: int = option(96, "Token budget of a response in this tokenizer; longer ones are cut off.")
    w: float = option(0.5, "Weight of the local (token) loss; the global (sentence) loss has 1 - w (paper: 0.4-0.6).")
    class_weights: list[float] = option(
        [], f"Weights of the local loss, {_CLASSES}; none: inverse class frequency of the training tokens."
    )
    class_keep_ratios: list[float] = option(
        [], f"Class mask: chance of a token to stay in the local loss, {_CLASSES}; none: all stay."
    )
    learning_rate: float = option(3e-5, "Peak learning rate of AdamW.")
    num_train_epochs: float = option(2.0, "Passes over the labelled responses (paper: 2).")
    max_steps: int = option(0, "Stop after this many optimiser steps; 0 makes the passes above.")
    per_device_train_batch_size: int = option(8, "Responses a rank and a micro-batch.")
    per_device_eval_batch_size: int = option(16, "Responses a rank in evaluation.")
    gradient_accumulation_steps: int = option(1, "Micro-batches an optimiser step.")
    warmup_ratio: float = option(0.06, "Share of the steps in which the learning rate rises.")
    lr_scheduler_type: str = option(
        "linear", "How the learning rate falls.", choices=["cosine", "linear", "constant_with_warmup"]
    )
    weight_decay: float = option(0.0, "AdamW's decoupled weight decay.")
    max_grad_norm: float = option(1.0, "Gradients are scaled down to this norm.")
    logging_steps: int = option(10, "Steps between two points of the training curves.")
    eval_steps: int = option(100, "Steps between two evaluations on the held-out users; there is one at the end.")
    save_steps: int = option(100, "Steps between two checkpoints; there is one at the end.")
    save_total_limit: int = option(2, "Checkpoints kept; 2 or more, so that one is whole while the next is written.")

    @property
    def inputs(self) -> RewardInputOptions:
        """How the model's inputs are made; saved beside it, because step 3 must make them alike."""
        return RewardInputOptions(
            self.prompt_template, self.num_queries, self.max_prompt_tokens, self.max_response_tokens
        )


def check_config(config: Step2Config) -> None:
    """Raise `InputError` for settings that cannot work, before anything is loaded."""
    for name in ("model_name_or_path", "samples", "labels", "output_dir"):
        if not getattr(config, name):
            raise InputError(f"--{name} is missing")
    for name in (
        "num_queries", "max_prompt_tokens", "max_response_tokens", "num_train_epochs", "learning_rate",
        "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
        "logging_steps", "eval_steps", "save_steps",
    ):  # fmt: skip
        if getattr(config, name) <= 0:
            raise InputError(f"--{name} must be above 0, not {getattr(config, name)}")
    if config.max_steps < 0:
        raise InputError(f"--max_steps must be 0 (no limit) or more, not {config.max_steps}")
    if config.save_total_limit < 2:
        raise InputError("--save_total_limit must be 2 or more: a kill during a save would leave no checkpoint")
    if not 0 <= config.warmup_ratio < 1:
        raise InputError(f"--warmup_ratio is a share of the steps, 0 <= ratio < 1, not {config.warmup_ratio}")
    if not 0 <= config.w <= 1:
        raise InputError(f"--w is the local loss's share of the whole, 0 to 1, not {config.w}")
    if config.class_weights and (len(config.class_weights) != NUM_CLASSES or min(config.class_weights) <= 0):
        raise InputError(f"--class_weights needs {NUM_CLASSES} numbers above 0, {_CLASSES}; not {config.class_weights}")
    ratios = config.class_keep_ratios
    if ratios and (len(ratios) != NUM_CLASSES or not all(0 < ratio <= 1 for ratio in ratios)):
        raise InputError(f"--class_keep_ratios needs {NUM_CLASSES} numbers in 0 < ratio <= 1, {_CLASSES}; not {ratios}")


def training_arguments(config: Step2Config) -> TrainingArguments:
    """The Trainer's settings, DeepSpeed's among them. Make them before the model: ZeRO-3 shards it as it loads."""
    args = TrainingArguments(
        output_dir=str(Path(config.output_dir) / "checkpoints"),
        seed=config.seed,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler_type,
        warmup_steps=config.warmup_ratio,  # below 1 it is a share of all steps
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim="adamw_torch",
        num_train_epochs=config.num_train_epochs,
        max_steps=config.max_steps or -1,
        per_device_train_batch_size=config.per_device_train_batch_size,
        per_device_eval_batch_size=config.per_device_eval_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        bf16=config.dtype == "bf16",
        use_cpu=not torch.cuda.is_available(),
        activation_checkpointing=config.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        eval_strategy="steps",
        eval_steps=config.eval_steps,
        save_strategy="steps",
        save_steps=config.save_steps,
        save_total_limit=config.save_total_limit,
        logging_steps=config.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # a NaN must be seen, not averaged away
        remove_unused_columns=False,  # the collator reads our own columns
        report_to="none",
        log_level="warning",
        deepspeed=trainer_deepspeed_config(config),
    )
    if args.hf_deepspeed_config.mismatches:
        raise InputError(
            f"{config.deepspeed_config} contradicts the flags: {'; '.join(args.hf_deepspeed_config.mismatches)}. "
            "Write 'auto' there, or set the flags alike"
        )
    return args
