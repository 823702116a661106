"""QLoRA: frozen weights in 4 bits (nf4, bitsandbytes) under adapters that are trained."""

from __future__ import annotations

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from transformers import BitsAndBytesConfig

from common.models.kernels import require_cuda


def check_quantization(quantize: str) -> None:
    """Raise `InputError` unless this machine can quantise; `bitsandbytes` is not imported for it."""
    if quantize != "none":
        require_cuda(f"--quantize {quantize}", "bitsandbytes", "bitsandbytes", "leave the flag out")


def quantization_config(quantize: str) -> BitsAndBytesConfig | None:
    """What `from_pretrained` quantises by; None for "none"."""
    if quantize == "none":
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantize,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
    )


def is_packed(weight: torch.Tensor) -> bool:
    """Whether `weight` holds packed numbers, which nothing can be added to."""
    return not weight.is_floating_point()


def unpacked_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of `model` with every packed weight as the numbers that it stands for, on the CPU.

    They are those that the model computes with, not those that it was quantised from.
    """
    state = {name: value.cpu() for name, value in model.state_dict().items()}
    for name, module in model.named_modules():
        if isinstance(weight := getattr(module, "weight", None), nn.Parameter) and is_packed(weight):
            prefix = f"{name}.weight"
            state = {key: value for key, value in state.items() if not key.startswith(f"{prefix}.")}
            state[prefix] = dequantize_module_weight(module).detach().cpu()
    return state
