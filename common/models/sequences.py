"""Prompts and responses as one padded batch, and the log-probs of the response tokens.

Where things stand (docs/method.md, section 1): a row is a prompt of P tokens and its response behind it, padded on the
right. Response token t has position P + t; its log-prob is read from the logits at P + t - 1, and so is the value of
the state in which it was chosen. Under causal attention no real token sees what is right of it, so a pass over such
rows needs no mask, which is the fast path of every attention kernel, and positions count from 0. Masks are made from
lengths, never from `ids != pad`: pad may be EOS.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from common.models.token_scores import scoring_head, token_scores_from_hidden, token_scores_from_logits


class SequenceBatch(NamedTuple):
    """`input_ids` and `attention_mask` (1 on real tokens) (B, L); `predicting` (B, L) bool, one place before each
    response token; `response_mask` (B, T) bool."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    predicting: torch.Tensor
    response_mask: torch.Tensor

    @property
    def response_ids(self) -> torch.Tensor:
        """The response tokens, row by row: (M,)."""
        return self.input_ids[:, 1:][self.predicting[:, :-1]]

    def rows(self, index: torch.Tensor) -> SequenceBatch:
        """The rows `index` (int64), with padding that all of them share cut off."""
        picked = SequenceBatch(*(tensor[index] for tensor in self))
        length, responses = (int(mask.sum(1).max()) for mask in (picked.attention_mask, picked.response_mask))
        sequences = (tensor[:, :length] for tensor in picked[:3])
        return SequenceBatch(*sequences, picked.response_mask[:, :responses])

    def by_length(self, index: torch.Tensor, size: int) -> list[torch.Tensor]:
        """The rows `index` in blocks of at most `size`, sequences of similar length together: little padding."""
        lengths = self.attention_mask.sum(1)[index]
        return list(index[lengths.argsort(descending=True, stable=True)].split(size))

    def by_tokens(self, index: torch.Tensor, budget: int, blocks: int = 1) -> list[torch.Tensor]:
        """The rows `index`, longest first, in as few blocks as hold at most `budget` tokens, padding included, but in
        at least `blocks` (no more than there are rows). A row longer than the budget gets a block of its own."""
        lengths = self.attention_mask.sum(1)[index]
        order = lengths.argsort(descending=True, stable=True)
        sizes: list[int] = []
        start, sorted_lengths = 0, lengths[order].tolist()
        while start < len(sorted_lengths):
            sizes.append(min(max(1, budget // sorted_lengths[start]), len(sorted_lengths) - start))
            start += sizes[-1]
        while len(sizes) < blocks:
            largest = max(range(len(sizes)), key=sizes.__getitem__)
            sizes[largest : largest + 1] = [sizes[largest] - sizes[largest] // 2, sizes[largest] // 2]
        return list(index[order].split(sizes))


class ScoringWay(NamedTuple):
    """How response tokens are scored, which changes no score: `packed` into one row without padding, which pays where
    the attention kernel skips what lies outside a sequence (flash attention); `in_pieces` of the vocabulary, so that
    full logits never exist (`common.models.token_scores`)."""

    packed: bool = False
    in_pieces: bool = False


PLAIN = ScoringWay()


class TokenScores(NamedTuple):
    """`logprobs` of the response tokens and `entropy` of the distributions they were drawn from, both (B, T) fp32."""

    logprobs: torch.Tensor
    entropy: torch.Tensor


def pad_sequences(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad_token_id: int, device: torch.device
) -> SequenceBatch:
    """Prompts with their responses behind them, padded on the right; no prompt and no response may be empty."""
    if not all(prompts) or not all(responses):
        raise ValueError("a prompt or a response without tokens")
    rows = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad_token_id] * (width - len(row)) for row in rows], device=device)
    begins, counts, lengths = (
        torch.tensor([len(item) for item in items], device=device).unsqueeze(1) for items in (prompts, responses, rows)
    )
    places = torch.arange(width, device=device)
    return SequenceBatch(
        input_ids=ids,
        attention_mask=(places < lengths).long(),
        predicting=(places >= begins - 1) & (places < lengths - 1),
        response_mask=torch.arange(int(counts.max()), device=device) < counts,
    )


def response_scores(
    forward: Callable[..., Any],
    module: nn.Module,
    batch: SequenceBatch,
    temperature: float,
    way: ScoringWay = PLAIN,
    entropy_gradient: bool = False,
) -> TokenScores:
    """Log-probs and entropies of the response tokens under the sampling distribution `softmax(logits / temperature)`.

    `forward` is what to call (a DeepSpeed engine, or the module itself), `module` the model behind it, asked what
    its forward accepts. Logits are computed where a response token is predicted and nowhere else; softmax in fp32.
    Gradients flow to the log-probs, and to the entropy if asked to. 0 where masked.
    """
    ids = batch.response_ids
    arguments = forward_arguments(module, batch, way.packed)
    if way.in_pieces:
        def score(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            return torch.stack(token_scores_from_hidden(hidden, weight, bias, ids, temperature), dim=-1)

        with scoring_head(without_wrapper(module), score):
            logprobs, entropy = forward(**arguments).logits.unbind(-1)
        entropy = entropy if entropy_gradient else entropy.detach()
    else:
        logits = forward(**arguments).logits
        logprobs, entropy = token_scores_from_logits(logits, ids, temperature, entropy_gradient)
    return TokenScores(unflattened(logprobs, batch), unflattened(entropy, batch))


def unflattened(values: torch.Tensor, batch: SequenceBatch) -> torch.Tensor:
    """What was computed at the response tokens, row by row (M,), as (B, T); 0 where masked."""
    return values.new_zeros(batch.response_mask.shape).masked_scatter(batch.response_mask, values)


def score_in_blocks(
    batch: SequenceBatch, blocks: Sequence[torch.Tensor], forward: Callable[[SequenceBatch], Sequence[torch.Tensor]]
) -> list[torch.Tensor]:
    """What `forward` gives for the response tokens of each row: (B, T) tensors, 0 past the width of a row's block.

    `blocks` hold the numbers of all rows.
    """
    results: list[torch.Tensor] = []
    for rows in blocks:
        for place, scores in enumerate(forward(batch.rows(rows))):
            if place == len(results):
                results.append(torch.zeros_like(batch.response_mask, dtype=scores.dtype))
            results[place][rows, : scores.shape[1]] = scores
    return results


def forward_arguments(module: nn.Module, batch: SequenceBatch, packed: bool = False) -> dict[str, Any]:
    """Keyword arguments for `module`'s forward, no cache among them; of a model with logits (which takes
    `logits_to_keep`) those alone that predict a response token, (M, V).

    Packed, all rows stand behind each other in one without any padding: where positions begin anew, so does a sequence,
    which transformers tells the attention kernel.
    """
    arguments: dict[str, Any] = {"input_ids": _laid_out(batch.input_ids, batch, packed)}
    if packed:
        arguments["position_ids"] = _laid_out(batch.attention_mask.cumsum(1) - 1, batch, packed)
    if accepts(module, "use_cache"):
        arguments["use_cache"] = False
    if accepts(module, "logits_to_keep"):
        arguments["logits_to_keep"] = _laid_out(batch.predicting, batch, packed)
    return arguments


def hidden_of_predictions(trunk: nn.Module, batch: SequenceBatch, packed: bool = False) -> torch.Tensor:
    """The trunk's last hidden states where a response token is predicted, row by row: (M, H)."""
    hidden = trunk(**forward_arguments(trunk, batch, packed)).last_hidden_state
    return hidden[_laid_out(batch.predicting, batch, packed)]


def _laid_out(tensor: torch.Tensor, batch: SequenceBatch, packed: bool) -> torch.Tensor:
    """A (B, L) tensor as the model reads it: as it is, or packed its real tokens in one row."""
    return tensor[batch.attention_mask.bool()].unsqueeze(0) if packed else tensor


def accepts(module: nn.Module, argument: str) -> bool:
    """Whether the model's forward names `argument`; a peft wrapper passes on to the model inside."""
    return argument in inspect.signature(without_wrapper(module).forward).parameters


def without_wrapper(module: nn.Module) -> nn.Module:
    """The model itself where peft wraps it; adapters live inside its layers."""
    return module.get_base_model() if hasattr(module, "get_base_model") else module
