"""Settings of the DPO baseline."""

from __future__ import annotations

from dataclasses import dataclass

from common.config import check_numbers, option
from common.engine.trainer_options import TrainerOptions, check_trainer_options
from common.errors import InputError


@dataclass
class DpoConfig(TrainerOptions):
    """Baseline: direct preference optimisation of step 1's model on the sentence labels of its samples."""

    model_name_or_path: str = option(
        "", "The model that is tuned, also the reference: step 1's folder model/.", group="model and data",
    )
    pad_token: str = option("", "Pad token where the tokenizer has none: 'eos', or a token of its vocabulary.")
    samples: str = option("", "The labelled responses: samples.jsonl, written by step 2's sample.py.")
    labels: str = option("", "Their labels: labels.jsonl, written by step 2's label.py; sentence scores are read.")
    prompt_template: str = option("plain", "The template of step 1.", group="prompts and responses")
    num_queries: int = option(3, "Queries a response, as in step 1.", minimum=1)
    max_prompt_tokens: int = option(512, "Token budget of a prompt, as in step 1.", minimum=1)
    beta: float = option(
        0.1, "Weight of the KL to the reference (the paper of DPO: 0.1 to 0.5).", group="loss", above=0
    )
    temperature: float = option(1.0, "Log-probs are taken at it: that of the samples and of later use.", above=0)
    learning_rate: float = option(5e-7, "Peak learning rate of AdamW.", above=0)
    num_train_epochs: float = option(1.0, "Passes over the pairs.", above=0)
    per_device_train_batch_size: int = option(4, "Pairs a rank and a micro-batch.", minimum=1)
    per_device_eval_batch_size: int = option(16, "Pairs a rank in evaluation.", minimum=1)
    warmup_ratio: float = option(0.1, "Share of the steps in which the learning rate rises.", below=1)
    lr_scheduler_type: str = option(
        "linear", "How the learning rate falls.", choices=["cosine", "linear", "constant_with_warmup"]
    )


def check_config(config: DpoConfig) -> None:
    """Raise `InputError` for settings that cannot work, before anything is loaded."""
    for name in ("model_name_or_path", "samples", "labels", "output_dir"):
        if not getattr(config, name):
            raise InputError(f"--{name} is missing")
    check_numbers(config)
    check_trainer_options(config)
