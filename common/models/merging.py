"""Adapters and the model that they were trained on, as one ordinary model folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from common.access import check_writable
from common.config import ModelOptions, option, parse_config
from common.data.prompt_settings import SETTINGS_NAME, load_prompt_settings
from common.errors import InputError, one_line
from common.models.loading import (
    ADAPTER_FOLDER,
    load_causal_lm,
    load_model_config,
    load_tokenizer,
    save_model_folder,
)

ADAPTER_CONFIG = "adapter_config.json"


@dataclass
class MergeConfig:
    """Add trained adapters to their base model's weights; writes a model folder that needs no peft."""

    adapter: str = option("", "Folder with adapter_config.json, or the model folder above it.")
    base: str = option("", "Model that the adapters belong to: a folder or hub name; empty: the one they name.")
    output: str = option("", "Model folder to write; it must not be there yet.")
    dtype: str = option("auto", "Precision of the merged weights; auto: the base's.", choices=["auto", "fp32", "bf16"])


def main() -> None:
    """Load the base, add the adapters, write one folder."""
    config = parse_config(MergeConfig)
    folder = adapter_folder(config)
    base = config.base or base_of(folder)
    merge(folder, base, config.output, config.dtype)
    print(
        f"merged model: {config.output} ({base} with the adapters of {folder})\n"
        f"next:         give it to any flag that takes a model folder (--actor_path {config.output}), or load it with "
        f"AutoModelForCausalLM.from_pretrained({config.output!r})"
    )


def adapter_folder(config: MergeConfig) -> Path:
    """The folder with the adapters; raises `InputError` for flags that cannot work, before anything is loaded."""
    if not config.adapter or not config.output:
        raise InputError("give --adapter and --output")
    if Path(config.output).exists():
        raise InputError(f"{config.output} is there already; choose another --output, or remove it")
    check_writable(Path(config.output).parent, "choose another --output")
    for folder in (Path(config.adapter), Path(config.adapter) / ADAPTER_FOLDER):
        if (folder / ADAPTER_CONFIG).is_file():
            return folder
    raise InputError(
        f"{config.adapter}: no adapters (no {ADAPTER_CONFIG}); step 1 and step 3 write them to model/{ADAPTER_FOLDER}"
    )


def base_of(folder: Path) -> str:
    """The model that the adapters in `folder` name as theirs. Raises `InputError` where they name none."""
    base = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    if not base:
        raise InputError(f"{folder}: the adapters do not say which model they belong to; give it with --base")
    return base


def stored_dtype(base: str) -> str:
    """The precision in which the weights at `base` are stored, where this project computes in it; else fp32."""
    return "bf16" if load_model_config(base).dtype == torch.bfloat16 else "fp32"


def merge(folder: Path, base: str, output: str | Path, dtype: str = "auto") -> Path:
    """Write the model at `base` with the adapters in `folder` added to `output`, which appears whole or not at all.

    The tokenizer is the one beside the adapters, or else the base's; what is recorded there of the prompts in training
    goes with it. Raises `InputError` for a base that cannot be loaded or that the adapters do not fit.
    """
    source = str(folder) if (folder / "tokenizer_config.json").is_file() else base
    tokenizer = load_tokenizer(source)
    model = load_causal_lm(base, ModelOptions(dtype=stored_dtype(base) if dtype == "auto" else dtype))
    try:
        adapted = PeftModel.from_pretrained(model, str(folder))
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"{base}: the adapters of {folder} do not fit this model ({one_line(error, 150)}); give theirs with --base"
        ) from error
    prompts = load_prompt_settings(folder).builder(tokenizer) if (folder / SETTINGS_NAME).is_file() else None
    merged = adapted.merge_and_unload(safe_merge=True)
    return save_model_folder(merged, tokenizer, output, _generation(folder), prompts=prompts)


def _generation(folder: Path) -> dict[str, Any]:
    """Settings of generation that were saved beside adapters, but for the ids, which are the tokenizer's."""
    if not (folder / GENERATION_CONFIG_NAME).is_file():
        return {}
    saved = GenerationConfig.from_pretrained(str(folder)).to_diff_dict()
    return {name: value for name, value in saved.items() if not name.endswith("_token_id")}
