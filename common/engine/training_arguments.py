"""From the settings of steps 1 and 2 to the Trainer's, and the folder that a run writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from common.engine.claim import claim_run
from common.engine.deepspeed_config import contradiction, trainer_deepspeed_config
from common.engine.environment import write_environment
from common.engine.trainer import remove_incomplete_checkpoints
from common.engine.trainer_options import TrainerOptions

# What may change between a run and its continuation.
MAY_DIFFER = frozenset(
    {
        "output_dir", "resume", "overwrite", "tensorboard", "save_total_limit", "logging_steps",
        "per_device_eval_batch_size", "hang_timeout",
        # As long as the sequences an optimiser step stay the same (`prepare_to_load`).
        "per_device_train_batch_size", "gradient_accumulation_steps",
    }
)


def prepare_output(options: TrainerOptions, facts: Mapping[str, Any] | None = None) -> None:
    """Claim the run's folder, delete what a killed run left half written there, and note what this one runs on. Call on
    one process.

    `facts` are recorded beside the settings, for the run to read when it is resumed.
    Raises `InputError` where `claim_run` does.
    """
    output_dir = claim_run(options, MAY_DIFFER, facts)
    remove_incomplete_checkpoints(output_dir / "checkpoints")
    write_environment(output_dir, options)


def training_arguments(options: TrainerOptions, **extra: Any) -> TrainingArguments:
    """The Trainer's settings, DeepSpeed's among them. Make them before the model: ZeRO-3 shards it as it loads.

    `extra` are further TrainingArguments. Raises `InputError` when `deepspeed_config` contradicts the flags.
    """
    args = TrainingArguments(
        output_dir=str(Path(options.output_dir) / "checkpoints"),
        seed=options.seed,
        learning_rate=options.learning_rate,
        lr_scheduler_type=options.lr_scheduler_type,
        warmup_steps=options.warmup_ratio,  # below 1 it is a share of all steps
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        optim="adamw_torch_fused" if options.fused_adam else "adamw_torch",
        num_train_epochs=options.num_train_epochs,
        max_steps=options.max_steps or -1,
        per_device_train_batch_size=options.per_device_train_batch_size,
        per_device_eval_batch_size=options.per_device_eval_batch_size,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        bf16=options.dtype == "bf16",
        use_cpu=not torch.cuda.is_available(),
        activation_checkpointing=options.gradient_checkpointing,
        # Reentrant recomputation needs inputs with gradients, which frozen (LoRA) embeddings do not give.
        activation_checkpointing_kwargs={"use_reentrant": False},
        eval_strategy="steps",
        eval_steps=options.eval_steps,
        save_strategy="steps",
        save_steps=options.save_steps,
        save_total_limit=options.save_total_limit,
        logging_steps=options.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # a NaN must be seen, not averaged away
        remove_unused_columns=False,  # collators read columns of our own
        report_to="none",
        log_level="warning",
        log_level_replica="error",  # a warning is every rank's: the first shows it
        deepspeed=trainer_deepspeed_config(options),
        **extra,
    )
    if args.hf_deepspeed_config.mismatches:
        raise contradiction(options.deepspeed_config, args.hf_deepspeed_config.mismatches)
    return args
