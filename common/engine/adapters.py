"""LoRA adapters: settings that go together, and adapters merged into the weights while a model generates, and taken out
again to the last bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from common.engine.deepspeed_config import EngineOptions, zero_stage
from common.errors import InputError
from common.models.quantization import is_packed


class AdapterOptions(EngineOptions, Protocol):
    """The flags read here: `LoraOptions`, one of `ModelOptions`, and what DeepSpeed's settings are made of."""

    gradient_checkpointing: bool
    lora_r: int
    lora_rslora: bool
    lora_dora: bool
    quantize: str


def check_dora(options: AdapterOptions) -> None:
    """Raise `InputError` where DoRA would meet weights that ZeRO-3 has not gathered.

    peft reads its matrices for the norms without calling their modules, which is what DeepSpeed gathers them by; in a
    recomputed forward pass they may be gone.
    """
    if options.lora_dora and options.gradient_checkpointing and zero_stage(options) == 3:
        raise InputError(
            "--lora_dora with --gradient_checkpointing cannot run under ZeRO-3: peft reads weights that are sharded "
            "again. Use --zero_stage 2, or leave one of the two out"
        )


def check_adapters(options: AdapterOptions) -> None:
    """Raise `InputError` for settings of adapters that cannot work together, on any machine."""
    if options.lora_r < 0:
        raise InputError(f"--lora_r is the rank of the adapters, 0 for none, not {options.lora_r}")
    for flag in ("lora_rslora", "lora_dora"):
        if getattr(options, flag) and options.lora_r == 0:
            raise InputError(f"--{flag} is for adapters and there are none; add --lora_r 16")
    if options.quantize == "none":
        return
    if options.lora_r == 0:
        raise InputError(f"--quantize {options.quantize} freezes the weights, so adapters must learn; add --lora_r 16")
    if options.dtype != "bf16":
        raise InputError(f"--quantize {options.quantize} computes in bf16, not {options.dtype}; add --dtype bf16")
    if zero_stage(options) == 3:
        raise InputError(
            f"--quantize {options.quantize} keeps the 4-bit weights whole on every rank, which ZeRO-3 would shard; use "
            "--zero_stage 2 (optimizer states and gradients of the adapters are sharded all the same)"
        )


@contextmanager
def merged_adapters(model: nn.Module) -> Iterator[None]:
    """`model` with its adapters merged; a model without adapters as it is.

    Each decoding pass would run the adapters' small matrices beside every layer otherwise. peft merges in place and
    takes a difference off again, which leaves rounding behind in the frozen weights, more with every rollout: here it
    merges into copies (so one copy of the adapted layers is held meanwhile), and the weights themselves come back,
    untouched, also after an exception. Every weight must be whole on this rank. Over packed (4-bit) weights adapters
    stay beside their layers: merging would round the sum to 4 bits, so that another policy generated.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer) and not _over_packed(module)]
    kept: list[tuple[nn.Parameter, torch.Tensor]] = []
    try:
        for layer in layers:
            for parameter in layer.get_base_layer().parameters(recurse=False):
                kept.append((parameter, parameter.data))
                parameter.data = parameter.data.clone()
            layer.merge()
        yield
    finally:
        for layer in layers:
            layer.merged_adapters.clear()
        for parameter, weight in kept:
            parameter.data = weight


def _over_packed(layer: BaseTunerLayer) -> bool:
    return any(is_packed(parameter) for parameter in layer.get_base_layer().parameters(recurse=False))
