"""Optimiser states that rest in host memory while the model generates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import deepspeed
import torch


@contextmanager
def resting_optimizers(*engines: deepspeed.DeepSpeedEngine) -> Iterator[None]:
    """What the optimisers of `engines` hold, moments and fp32 master weights, in host memory; back on leaving.

    DeepSpeed's own `offload_states` is for ZeRO-3 with its compiled Adam alone. Values are moved, never changed, and
    come back also after an exception.
    """
    tensors = [tensor for engine in engines for tensor in optimizer_tensors(engine)]
    homes = [tensor.device for tensor in tensors]
    for tensor in tensors:
        resting = torch.empty_like(tensor.data, device="cpu", pin_memory=tensor.is_cuda)
        tensor.data = resting.copy_(tensor.data)
    try:
        yield
    finally:
        for tensor, home in zip(tensors, homes, strict=True):
            tensor.data = tensor.data.to(home, copy=True)


def optimizer_tensors(engine: deepspeed.DeepSpeedEngine) -> list[torch.Tensor]:
    """Moments and master weights of this rank; weights that the model itself computes with are not among them."""
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    in_use = {parameter.data_ptr() for parameter in engine.module.parameters() if parameter.numel()}
    masters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    # ZeRO-3 hands its masters to the optimiser for the length of a step only.
    masters += getattr(engine.optimizer, "fp32_partitioned_groups_flat", [])
    states = [value for state in optimizer.state.values() for value in state.values()]
    held = [value for value in (*masters, *states) if isinstance(value, torch.Tensor)]
    return [tensor for tensor in held if tensor.numel() > 1 and tensor.data_ptr() not in in_use]
