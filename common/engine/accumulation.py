"""An optimiser step of as many micro-batches as its tokens need, the same number on every rank."""

from __future__ import annotations

import deepspeed
import torch

from common.engine import distributed
from common.models.sequences import SequenceBatch


def micro_batches(batch: SequenceBatch, index: torch.Tensor, size: int, token_budget: int) -> list[torch.Tensor]:
    """The rows `index` of `batch` in blocks, sequences of similar length together.

    With a `token_budget` blocks hold as many rows as fit into it, padding included, else `size` rows each. Their number
    is the same on every rank, as sharded weights need: that of the rank that needs most. Every rank must call it with
    as many rows.
    """
    if token_budget == 0:
        return batch.by_length(index, size)
    needed = distributed.largest_over_ranks(len(batch.by_tokens(index, token_budget)))
    return batch.by_tokens(index, token_budget, blocks=needed)


def accumulate(engine: deepspeed.DeepSpeedEngine, loss: torch.Tensor, last: bool) -> None:
    """One micro-batch's backward pass, and after the last one of the optimiser step the step itself.

    Gradients are summed over the micro-batches, not averaged: a loss brings its own denominator.
    """
    engine.set_gradient_accumulation_boundary(last)
    engine.backward(loss, scale_wrt_gas=False)
    if last:
        engine.step()
