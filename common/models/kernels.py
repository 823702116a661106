"""Kernels chosen by flag: each is checked at start, and nothing that needs CUDA is imported without its flag."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from typing import TypeVar

import torch
from transformers import PreTrainedModel
from transformers.integrations.liger import apply_liger_kernel

from common.access import check_writable
from common.config import ModelOptions
from common.errors import InputError

Options = TypeVar("Options", bound=ModelOptions)

# Losses of our own are made of logits, which Liger's fused losses would keep from us.
LIGER_PARTS = {"cross_entropy": False, "fused_linear_cross_entropy": False}


def settle_dtype(options: Options) -> Options:
    """`options` with the precision that `--dtype auto` stands for on this machine; every command does this first."""
    if options.dtype != "auto":
        return options
    has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return dataclasses.replace(options, dtype="bf16" if has_bf16 else "fp32")


def check_attention(implementation: str, dtype: str) -> None:
    """Raise `InputError` unless this machine can run the attention kernel in this precision."""
    if implementation == "flex_attention" and not torch.cuda.is_available():
        raise InputError("--attn_implementation flex_attention needs a CUDA GPU and there is none; use sdpa")
    if implementation != "flash_attention_2":
        return
    require_cuda("--attn_implementation flash_attention_2", "flash_attn", "flash-attn", "use sdpa")
    if dtype != "bf16":
        raise InputError(f"--attn_implementation flash_attention_2 computes in bf16, not {dtype}; add --dtype bf16")


def check_liger() -> None:
    """Raise `InputError` unless this machine can run Liger's kernels, and keep what Triton compiles of them."""
    require_cuda("--liger", "liger_kernel", "liger-kernel", "leave the flag out")
    home = os.environ.get("TRITON_HOME") or os.path.expanduser("~")
    kept = os.environ.get("TRITON_CACHE_DIR") or os.path.join(home, ".triton", "cache")
    check_writable(kept, "--liger compiles kernels: set TRITON_CACHE_DIR to a folder of your own, or leave it out")


def check_liger_family(model_type: str) -> None:
    """Raise `InputError` unless Liger, which `check_liger` has passed, has kernels for models of `model_type`, as their
    configurations name it."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        known = ", ".join(sorted(MODEL_TYPE_TO_APPLY_LIGER_FN))
        raise InputError(f"--liger has no kernels for models of type {model_type!r} (it has for {known}); leave it out")


def apply_liger(model: PreTrainedModel) -> None:
    """Replace norms, MLPs and rotary positions of `model`, which `check_liger` has passed, by Liger's, in place."""
    apply_liger_kernel(model, LIGER_PARTS)


def require_cuda(flag: str, module: str, package: str, otherwise: str) -> None:
    """Raise `InputError` unless there is a CUDA GPU and `module` of the PyPI `package`, which is not imported here.

    `flag` is what asked for it, `otherwise` what the user can do without.
    """
    if not torch.cuda.is_available():
        raise InputError(f"{flag} needs a CUDA GPU and there is none; {otherwise}")
    if importlib.util.find_spec(module) is None:
        raise InputError(
            f"{flag} needs the {package} package (pip install -r requirements-gpu.txt --no-build-isolation); "
            f"or {otherwise}"
        )
