"""Settings of step 1."""

from __future__ import annotations

from dataclasses import dataclass

from common.config import LoraOptions, check_numbers, option
from common.engine.adapter_options import check_adapters, check_dora
from common.engine.trainer_options import TrainerOptions, check_trainer_options
from common.errors import InputError


@dataclass
class SftConfig(LoraOptions, TrainerOptions):
    """Step 1: supervised fine-tuning of a language model on histories and the queries that followed them."""

    model_name_or_path: str = option(
        "", "Base model: a folder or a hub name, any AutoModelForCausalLM.", group="model and data",
    )
    pad_token: str = option("", "Pad token where the tokenizer has none: 'eos', or a token of its vocabulary.")
    data_dir: str = option("", "Folder with train.jsonl and dev.jsonl.")
    prompt_template: str = option(
        "plain", "'plain', 'compact', 'chat' (the model's own), or a template file.", group="prompts and responses",
    )
    num_queries: int = option(3, "Queries a response (paper: 3 for AOL, 10 for the industrial log).", minimum=1)
    max_prompt_tokens: int = option(512, "Token budget of a prompt; the oldest events are left out.", minimum=1)
    max_response_tokens: int = option(
        64, "Longest response with EOS; examples that are longer are left out.", minimum=1
    )
    prompt_loss_weight: float = option(
        0.0, "Weight of a prompt token in the loss; a response token has 1. Above 0 for a base that is not pretrained."
    )


def check_config(config: SftConfig) -> None:
    """Raise `InputError` for settings that cannot work, here or anywhere, before anything is loaded."""
    for name in ("model_name_or_path", "data_dir", "output_dir"):
        if not getattr(config, name):
            raise InputError(f"--{name} is missing")
    check_numbers(config)
    check_trainer_options(config)
    check_adapters(config)
    check_dora(config)
