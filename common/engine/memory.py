"""Whether a rank has room for whole weights while it generates."""

from __future__ import annotations

import os
from typing import Literal

import deepspeed
import psutil
import torch

from common.engine import distributed

WeightMode = Literal["gathered", "sharded"]
GIB = 2**30
# Gathering needs a second buffer for what is on its way, and generating needs activations.
HEADROOM = 1.25


def gathered_bytes(engine: deepspeed.DeepSpeedEngine) -> int:
    """Bytes a rank must add to hold all weights of a ZeRO-3 engine; 0 where they are whole anyway."""
    return sum(
        parameter.ds_numel * parameter.element_size()
        for parameter in engine.module.parameters()
        if hasattr(parameter, "ds_numel") and not getattr(parameter, "ds_persist", False)
    )


def cache_bytes(config: object, rows: int, columns: int, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of `rows` rows of `columns` tokens of a model with this configuration."""
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_value_heads = getattr(config, "num_key_value_heads", None) or heads
    return 2 * config.num_hidden_layers * rows * columns * key_value_heads * size * dtype.itemsize


def free_bytes(device: torch.device) -> int:
    """Memory that this rank may still take: of its GPU, or its share of the host's where ranks are CPU processes."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", distributed.world_size()))
    return psutil.virtual_memory().available // ranks


def mode_that_fits(needed: int, cache: int, free: int) -> WeightMode:
    """Gathered if whole weights with their buffers, and keys and values, fit into what is free. Sizes in bytes."""
    return "gathered" if HEADROOM * needed + cache <= free else "sharded"


def weights_that_fit(needed: int, cache: int, free: int) -> tuple[WeightMode, str]:
    """How to see ZeRO-3 weights while generating, and why; the same on every rank. Sizes in bytes, of this rank."""
    tightest = -distributed.largest_over_ranks(-free)
    mode = mode_that_fits(needed, cache, tightest)
    return mode, (
        f"rollout weights: {mode} (gathered they take {needed / GIB:.2f} GiB a rank, times {HEADROOM} with buffers, "
        f"and keys and values {cache / GIB:.2f} GiB; {tightest / GIB:.2f} GiB are free on the fullest rank; "
        "--hybrid_weights overrules)"
    )
