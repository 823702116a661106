"""Prompts and responses as one padded batch, and the log-probs of the response tokens.

Where things stand (method, section 3): with prompts padded on the left to P and responses on the right to T, response
token t has position P + t. Its log-prob is read from the logits at P + t - 1, and so is the value of the state in
which it was chosen. Masks are made from lengths, never from `ids != pad`: pad may be EOS.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn


class SequenceBatch(NamedTuple):
    """`input_ids`, `attention_mask` (1 on real tokens) and `position_ids` (B, P + T), `response_mask` (B, T) bool."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    response_mask: torch.Tensor

    @property
    def response_ids(self) -> torch.Tensor:
        """The response part of `input_ids`, (B, T)."""
        return self.input_ids[:, -self.response_mask.shape[1] :]

    def rows(self, index: torch.Tensor) -> SequenceBatch:
        """The rows `index` (int64), with padding that all of them share cut off on both sides."""
        picked = SequenceBatch(*(tensor[index] for tensor in self))
        width, length = picked.response_mask.shape[1], int(picked.response_mask.sum(1).max())
        prompt = picked.attention_mask.shape[1] - width
        left = prompt - int(picked.attention_mask[:, :prompt].sum(1).max())
        columns = slice(left, prompt + length)
        return SequenceBatch(
            picked.input_ids[:, columns],
            picked.attention_mask[:, columns],
            picked.position_ids[:, columns],
            picked.response_mask[:, :length],
        )


    def by_length(self, index: torch.Tensor, size: int) -> list[torch.Tensor]:
        """The rows `index` in blocks of at most `size`, sequences of similar length together: little padding."""
        lengths = self.attention_mask.sum(1)[index]
        return list(index[lengths.argsort(descending=True, stable=True)].split(size))


class TokenScores(NamedTuple):
    """`logprobs` of the response tokens and `entropy` of the distributions they were drawn from, both (B, T) fp32."""

    logprobs: torch.Tensor
    entropy: torch.Tensor


def pad_sequences(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad_token_id: int, device: torch.device
) -> SequenceBatch:
    """Left-padded prompts followed by right-padded responses; no prompt and no response may be empty."""
    if not all(prompts) or not all(responses):
        raise ValueError("a prompt or a response without tokens")
    width, length = max(map(len, prompts)), max(map(len, responses))
    rows = list(zip(prompts, responses, strict=True))
    ids = [[pad_token_id] * (width - len(p)) + list(p) + list(r) + [pad_token_id] * (length - len(r)) for p, r in rows]
    real = [[0] * (width - len(p)) + [1] * (len(p) + len(r)) + [0] * (length - len(r)) for p, r in rows]
    attention_mask = torch.tensor(real, device=device)
    return SequenceBatch(
        input_ids=torch.tensor(ids, device=device),
        attention_mask=attention_mask,
        # Absolute positions must not count the padding; padding itself gets any valid position.
        position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0),
        response_mask=attention_mask[:, width:].bool(),
    )


def response_scores(
    forward: Callable[..., Any],
    module: nn.Module,
    batch: SequenceBatch,
    temperature: float,
    entropy_gradient: bool = False,
) -> TokenScores:
    """Log-probs and entropies of the response tokens under the sampling distribution `softmax(logits / temperature)`.

    `forward` is what to call (a DeepSpeed engine, or the module itself), `module` the model behind it, asked what
    its forward accepts. Softmax in fp32. Gradients flow to the log-probs, and to the entropy if asked to.
    """
    length = batch.response_mask.shape[1]
    arguments = forward_arguments(module, batch)
    if accepts(module, "logits_to_keep"):
        arguments["logits_to_keep"] = length + 1
    logits = forward(**arguments).logits[:, -length - 1 : -1].float() / temperature
    log_probabilities = logits.log_softmax(-1)
    chosen = log_probabilities.gather(-1, batch.response_ids.unsqueeze(-1)).squeeze(-1)
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        entropy = -(log_probabilities.exp() * log_probabilities).sum(-1)
    return TokenScores(chosen, entropy)


def score_in_blocks(
    batch: SequenceBatch, size: int, forward: Callable[[SequenceBatch], Sequence[torch.Tensor]]
) -> list[torch.Tensor]:
    """What `forward` gives for the response tokens of each row: (B, T) tensors, 0 past the width of a row's block.

    Rows of similar length share a block of at most `size`. The number of blocks follows from the number of rows, so it
    is the same on every rank that holds as many.
    """
    results: list[torch.Tensor] = []
    for rows in batch.by_length(torch.arange(len(batch.input_ids), device=batch.input_ids.device), size):
        for place, scores in enumerate(forward(batch.rows(rows))):
            if place == len(results):
                results.append(torch.zeros_like(batch.response_mask, dtype=scores.dtype))
            results[place][rows, : scores.shape[1]] = scores
    return results


def forward_arguments(module: nn.Module, batch: SequenceBatch) -> dict[str, Any]:
    """Keyword arguments for `module`'s forward: explicit positions where it takes them, no cache."""
    arguments: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if accepts(module, "position_ids"):
        arguments["position_ids"] = batch.position_ids
    if accepts(module, "use_cache"):
        arguments["use_cache"] = False
    return arguments


def accepts(module: nn.Module, argument: str) -> bool:
    """Whether the model's forward names `argument`; a peft wrapper passes on to the model inside."""
    inner = module.get_base_model() if hasattr(module, "get_base_model") else module
    return argument in inspect.signature(inner.forward).parameters
