"""LoRA adapters merged into the weights while a model generates, and taken out again to the last bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


@contextmanager
def merged_adapters(model: nn.Module) -> Iterator[None]:
    """`model` with its adapters merged; a model without adapters as it is.

    Each decoding pass would run the adapters' small matrices beside every layer otherwise. peft merges in place and
    takes a difference off again, which leaves rounding behind in the frozen weights, more with every rollout: here it
    merges into copies (so one copy of the adapted layers is held meanwhile), and the weights themselves come back,
    untouched, also after an exception. Every weight must be whole on this rank.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
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
