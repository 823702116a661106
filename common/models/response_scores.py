"""Log-probs and entropies of the response tokens of a batch, in whatever layout the model reads it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from common.models.layouts import Layout, ModelRows, forward_arguments, lay_out, without_wrapper
from common.models.sequences import SequenceBatch, unflattened
from common.models.token_scores import token_scores_from_logits, token_scores_of_head


class ScoringOptions(NamedTuple):
    """How response tokens are scored, which changes no score: the `layout` of a pass (`common.models.layouts`), and
    whether the vocabulary is taken in `chunks`, so that full logits never exist (`common.models.token_scores`)."""

    layout: Layout = "padded"
    chunks: bool = False


PADDED = ScoringOptions()


class TokenScores(NamedTuple):
    """`logprobs` of the response tokens and `entropy` of the distributions they were drawn from, both (B, T) fp32."""

    logprobs: torch.Tensor
    entropy: torch.Tensor


def response_scores(
    forward: Callable[..., Any],
    module: nn.Module,
    batch: SequenceBatch,
    temperature: float,
    options: ScoringOptions = PADDED,
    entropy_gradient: bool = False,
) -> TokenScores:
    """Log-probs and entropies of the response tokens under the sampling distribution `softmax(logits / temperature)`.

    `forward` is what to call (a DeepSpeed engine, or the module itself), `module` the model behind it, asked what
    its forward accepts. Logits are computed where a response token is predicted and nowhere else; softmax in fp32.
    Gradients flow to the log-probs, and to the entropy if asked to. 0 where masked.
    """
    rows = lay_out(batch, options.layout)
    return scores_of_rows(forward, module, rows, temperature, options.chunks, entropy_gradient)


def scores_of_rows(
    forward: Callable[..., Any],
    module: nn.Module,
    rows: ModelRows,
    temperature: float,
    chunks: bool = False,
    entropy_gradient: bool = False,
) -> TokenScores:
    """`response_scores` of a batch that is laid out already."""
    arguments, ids = forward_arguments(module, rows), rows.response_ids
    if chunks:
        logprobs, entropy = token_scores_of_head(
            forward, without_wrapper(module), arguments, ids, temperature, rows.index
        )
        entropy = entropy if entropy_gradient else entropy.detach()
    else:
        logits = forward(**arguments).logits
        logprobs, entropy = token_scores_from_logits(logits, ids, temperature, entropy_gradient, rows.index)
    return TokenScores(unflattened(logprobs, rows.response_mask), unflattened(entropy, rows.response_mask))
