"""LoRA adapters merged into the weights while a model generates, and taken out again to the last bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from common.models.quantization import is_packed


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
