"""Log-prob and entropy of chosen tokens from hidden states, with never more than a piece of the logits in memory.

A response of 50 tokens over a vocabulary of 150,000 has 30 MB of fp32 logits, its softmax and gradient as many again;
512 of them, as a scoring pass has, 15 GB. Here the vocabulary is taken in pieces: the forward pass keeps a running
maximum, sum and mean (online softmax), the backward pass computes each piece again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

VOCABULARY_PIECE = 8192


def token_scores_from_logits(
    logits: Tensor, ids: Tensor, temperature: float, entropy_gradient: bool = False, index: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Log-prob of `ids` (M,) and entropy, both (M,) fp32, under `softmax(logits / temperature)`.

    Token m is judged by row `index[m]` of the logits (U, V), without an `index` by row m. Gradients flow to the
    log-probs, and to the entropy if asked to.
    """
    logprobs = (logits.float() / temperature).log_softmax(-1)
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        entropy = -(logprobs.exp() * logprobs).sum(-1)
    if index is not None:
        return logprobs[index, ids], entropy[index]
    return logprobs.gather(-1, ids.unsqueeze(-1)).squeeze(-1), entropy


def token_scores_from_hidden(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, temperature: float, piece: int = VOCABULARY_PIECE
) -> tuple[Tensor, Tensor]:
    """`token_scores_from_logits(hidden @ weight.T + bias, ...)` without these logits; gradients flow to both results.

    hidden (M, H), weight (V, H), bias (V,) or None, ids (M,). `piece` rows of `weight` are taken at a time.
    """
    return _TokenScores.apply(hidden, weight, bias, ids, temperature, piece)


class _TokenScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, temperature: float, piece: int
    ) -> tuple[Tensor, Tensor]:
        shape = hidden.shape[:1]
        peak = hidden.new_full(shape, -torch.inf, dtype=torch.float32)
        total, weighted, chosen = (torch.zeros_like(peak) for _ in range(3))
        for start, logits in _pieces(hidden, weight, bias, temperature, piece):
            higher = torch.maximum(peak, logits.max(-1).values)
            fade = (peak - higher).exp()
            mass = (logits - higher.unsqueeze(-1)).exp()
            total = total * fade + mass.sum(-1)
            weighted = weighted * fade + (mass * logits).sum(-1)
            peak = higher
            inside, places = _places(ids, start, logits)
            chosen = torch.where(inside, logits.gather(-1, places.unsqueeze(-1)).squeeze(-1), chosen)
        log_total = peak + total.log()
        entropy = log_total - weighted / total
        ctx.save_for_backward(hidden, weight, bias, ids, log_total, entropy)
        ctx.settings = temperature, piece
        return chosen - log_total, entropy

    @staticmethod
    def backward(ctx: Any, logprob_gradient: Tensor, entropy_gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, ids, log_total, entropy = ctx.saved_tensors
        temperature, piece = ctx.settings
        hidden_gradient = torch.zeros_like(hidden)
        weight_gradient = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        bias_gradient = torch.empty_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
        for start, logits in _pieces(hidden, weight, bias, temperature, piece):
            log_share = logits - log_total.unsqueeze(-1)
            share = log_share.exp()
            # d log p_id / d l_j = [j = id] - p_j and dH / d l_j = -p_j (log p_j + H).
            factor = logprob_gradient.unsqueeze(-1) + entropy_gradient.unsqueeze(-1) * (
                log_share + entropy.unsqueeze(-1)
            )
            gradient = -share * factor
            inside, places = _places(ids, start, logits)
            own = torch.where(inside, logprob_gradient, 0.0)
            gradient.scatter_add_(-1, places.unsqueeze(-1), own.unsqueeze(-1))
            gradient = (gradient / temperature).to(hidden.dtype)
            rows = slice(start, start + logits.shape[-1])
            hidden_gradient += gradient @ weight[rows]
            if weight_gradient is not None:
                weight_gradient[rows] = gradient.T @ hidden
            if bias_gradient is not None:
                bias_gradient[rows] = gradient.sum(0)
        return hidden_gradient, weight_gradient, bias_gradient, None, None, None


def _pieces(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, piece: int
) -> Iterator[tuple[int, Tensor]]:
    """The logits of each piece of the vocabulary in fp32, over the temperature, with the place where it begins."""
    for start in range(0, len(weight), piece):
        rows = slice(start, start + piece)
        logits = nn.functional.linear(hidden, weight[rows], None if bias is None else bias[rows])
        yield start, logits.float() / temperature


def _places(ids: Tensor, start: int, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Which ids lie in the piece that begins at `start`, and where (0 for the others)."""
    places = ids - start
    inside = (places >= 0) & (places < logits.shape[-1])
    return inside, torch.where(inside, places, 0)


def token_scores_of_head(
    forward: Callable[..., Any],
    model: PreTrainedModel,
    arguments: dict[str, Any],
    ids: Tensor,
    temperature: float = 1.0,
    index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`token_scores_from_logits` of `forward(**arguments).logits`, which never exist as a whole.

    `forward` runs `model`, which must return what its output layer gives (`common.planning.models.gives_own_logits`).
    """

    def score(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        hidden = hidden if index is None else hidden[index]
        return torch.stack(token_scores_from_hidden(hidden, weight, bias, ids, temperature), dim=-1)

    with scoring_head(model, score):
        logprobs, entropy = forward(**arguments).logits.unbind(-1)
    return logprobs, entropy


@contextmanager
def scoring_head(model: PreTrainedModel, score: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> Iterator[None]:
    """Let the model's output layer give `score(hidden, weight, bias)` in place of logits.

    It stays a call of that module, so that ZeRO-3's hooks gather its weight before and after as ever.
    """
    head = model.get_output_embeddings()
    head.forward = lambda hidden: score(hidden, head.weight, getattr(head, "bias", None))
    try:
        yield
    finally:
        del head.forward
