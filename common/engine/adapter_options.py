"""LoRA settings that go together; read without torch, so that a wrong one is refused at once."""

from __future__ import annotations

from typing import Protocol

from common.engine.deepspeed_config import EngineOptions, zero_stage
from common.errors import InputError


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
    for flag in ("lora_rslora", "lora_dora"):
        if getattr(options, flag) and options.lora_r == 0:
            raise InputError(f"--{flag} is for adapters and there are none; add --lora_r 16")
    if options.quantize == "none":
        return
    if options.lora_r == 0:
        raise InputError(f"--quantize {options.quantize} freezes the weights, so adapters must learn; add --lora_r 16")
    if options.dtype == "fp32":
        raise InputError(f"--quantize {options.quantize} computes in bf16, not fp32; add --dtype bf16")
    if zero_stage(options) == 3:
        raise InputError(
            f"--quantize {options.quantize} keeps the 4-bit weights whole on every rank, which ZeRO-3 would shard; use "
            "--zero_stage 2 (optimizer states and gradients of the adapters are sharded all the same)"
        )
