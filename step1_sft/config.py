"""Settings of step 1."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import TrainingArguments

from common.config import LoraOptions, ModelOptions, RunOptions, ZeroOptions, option
from common.engine.deepspeed_config import trainer_deepspeed_config
from common.errors import InputError
from common.models.loading import check_attention

# What may change between a run and its continuation.
MAY_DIFFER = frozenset(
    {"resume", "overwrite", "tensorboard", "save_total_limit", "logging_steps", "per_device_eval_batch_size"}
)


@dataclass
class SftConfig(ZeroOptions, LoraOptions, ModelOptions, RunOptions):
    """Step 1: supervised fine-tuning of a language model on histories and the queries that followed them."""

    model_name_or_path: str = option("", "Base model: a folder or a hub name, any AutoModelForCausalLM.")
    pad_token: str = option("", "Pad token where the tokenizer has none: 'eos', or a token of its vocabulary.")
    data_dir: str = option("", "Folder with train.jsonl and dev.jsonl.")
    prompt_template: str = option("plain", "'plain', 'compact', 'chat' (the model's own), or a template file.")
    num_queries: int = option(3, "Queries a response (paper: 3 for AOL, 10 for the industrial log).")
    max_prompt_tokens: int = option(512, "Token budget of a prompt; the oldest events are left out.")
    max_response_tokens: int = option(64, "Longest response with EOS; examples that are longer are left out.")
    prompt_loss_weight: float = option(
        0.0, "Weight of a prompt token in the loss; a response token has 1. Above 0 for a base that is not pretrained."
    )
    learning_rate: float = option(2e-5, "Peak learning rate of AdamW.")
    num_train_epochs: float = option(2.0, "Passes over the training examples (paper: 2).")
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
    logging_steps: int = option(10, "Steps between two points of the training curves.")
    eval_steps: int = option(200, "Steps between two evaluations on the dev examples; there is one at the end.")
    save_steps: int = option(200, "Steps between two checkpoints; there is one at the end.")
    save_total_limit: int = option(2, "Checkpoints kept; 2 or more, so that one is whole while the next is written.")


def check_config(config: SftConfig) -> None:
    """Raise `InputError` for settings that cannot work, here or anywhere, before anything is loaded."""
    check_attention(config.attn_implementation, config.dtype)
    for name in ("model_name_or_path", "data_dir", "output_dir"):
        if not getattr(config, name):
            raise InputError(f"--{name} is missing")
    for name in (
        "num_queries", "max_prompt_tokens", "max_response_tokens", "num_train_epochs", "learning_rate",
        "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
        "logging_steps", "eval_steps", "save_steps",
    ):  # fmt: skip
        if getattr(config, name) <= 0:
            raise InputError(f"--{name} must be above 0, not {getattr(config, name)}")
    if config.save_total_limit < 2:
        raise InputError("--save_total_limit must be 2 or more: a kill during a save would leave no checkpoint")
    if not 0 <= config.warmup_ratio < 1:
        raise InputError(f"--warmup_ratio is a share of the steps, 0 <= ratio < 1, not {config.warmup_ratio}")
    for name in ("prompt_loss_weight", "max_steps", "weight_decay", "max_grad_norm"):
        if getattr(config, name) < 0:
            raise InputError(f"--{name} must not be negative, but is {getattr(config, name)}")


def training_arguments(config: SftConfig) -> TrainingArguments:
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
        train_sampling_strategy="group_by_length",
        bf16=config.dtype == "bf16",
        use_cpu=not torch.cuda.is_available(),
        activation_checkpointing=config.gradient_checkpointing,
        # Reentrant recomputation needs inputs with gradients, which frozen (LoRA) embeddings do not give.
        activation_checkpointing_kwargs={"use_reentrant": False},
        eval_strategy="steps",
        eval_steps=config.eval_steps,
        save_strategy="steps",
        save_steps=config.save_steps,
        save_total_limit=config.save_total_limit,
        logging_steps=config.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # a NaN must be seen, not averaged away
        remove_unused_columns=False,  # the collator reads prompt_length
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
