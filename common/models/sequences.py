"""Prompts and responses as one padded batch, and its division into blocks for a pass.

A row is a prompt of P tokens with its response behind it, padded on the right (docs/method.md, section 1). Response
token t has position P + t; its log-prob is read from the logits at P + t - 1, and so is the value of the state in
which it was chosen. Masks are made from lengths, never from `ids != pad`: pad may be EOS.

How a model reads the rows is another matter: see `common.models.layouts`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch


class SequenceBatch(NamedTuple):
    """Prompts with their responses.

    `input_ids` and `attention_mask` (1 on real tokens) are (B, L). `predicting` (B, L) bool marks the position before
    each response token. `response_mask` is (B, T) bool. `prompt_index` (B,) int64 is equal for rows that share a
    prompt; such a group stays together in a block as far as the block's size allows.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    predicting: torch.Tensor
    response_mask: torch.Tensor
    prompt_index: torch.Tensor

    @property
    def response_ids(self) -> torch.Tensor:
        """The response tokens, row by row: (M,)."""
        return self.input_ids[:, 1:][self.predicting[:, :-1]]

    @property
    def prompt_lengths(self) -> torch.Tensor:
        """Tokens of each row's prompt: (B,)."""
        return self.attention_mask.sum(1) - self.response_mask.sum(1)

    def rows(self, index: torch.Tensor) -> SequenceBatch:
        """The rows `index` (int64), without the padding that all of them share."""
        picked = SequenceBatch(*(tensor[index] for tensor in self))
        length, responses = (int(mask.sum(1).max()) for mask in (picked.attention_mask, picked.response_mask))
        sequences = (tensor[:, :length] for tensor in picked[:3])
        return SequenceBatch(*sequences, picked.response_mask[:, :responses], picked.prompt_index)

    def groups(self, index: torch.Tensor) -> list[torch.Tensor]:
        """The rows `index`, divided by prompt."""
        prompts = self.prompt_index[index]
        order = prompts.argsort(stable=True)
        counts = prompts[order].unique_consecutive(return_counts=True)[1]
        return list(index[order].split(counts.tolist()))

    def token_counts(self, groups: Sequence[torch.Tensor]) -> list[int]:
        """Tokens of each group of rows with one prompt: the prompt once, and every response."""
        prompts, responses = self.prompt_lengths.tolist(), self.response_mask.sum(1).tolist()
        rows = [group.tolist() for group in groups]
        return [prompts[group[0]] + sum(responses[row] for row in group) for group in rows]

    def by_length(self, index: torch.Tensor, size: int) -> list[torch.Tensor]:
        """The rows `index` in blocks of `size`, groups of similar length together: little padding.

        Blocks hold whole groups where `size` has room for one: it is rounded down to a multiple of the largest group.
        The number of blocks depends on the sizes of the groups alone, not on lengths. So it is the same on all ranks.
        """
        groups = self.groups(index)
        largest = max(map(len, groups))
        return list(torch.cat(self._longest_first(groups)).split(whole_groups(size, largest)))

    def by_tokens(self, index: torch.Tensor, budget: int, blocks: int = 1) -> list[torch.Tensor]:
        """The rows `index`, longest groups first, in as few blocks as hold at most `budget` tokens each.

        Padding counts, and a prompt counts once for its group. There are at least `blocks` blocks (but no more than
        rows). A group over the budget is divided; a single row over the budget gets a block of its own.
        """
        groups = self._longest_first(self._within(self.groups(index), budget))
        lengths = self.token_counts(groups)
        found: list[list[torch.Tensor]] = []
        while groups:
            count = max(1, budget // lengths[0])
            found.append(groups[:count])
            groups, lengths = groups[count:], lengths[count:]
        while len(found) < min(blocks, len(index)):
            largest = max(range(len(found)), key=lambda number: sum(map(len, found[number])))
            found[largest : largest + 1] = _halves(found[largest])
        return [torch.cat(block) for block in found]

    def _longest_first(self, groups: list[torch.Tensor]) -> list[torch.Tensor]:
        lengths = self.token_counts(groups)
        return [groups[place] for place in sorted(range(len(groups)), key=lambda place: -lengths[place])]

    def _within(self, groups: list[torch.Tensor], budget: int) -> list[torch.Tensor]:
        """The groups in parts of at most `budget` tokens and at least one row each."""
        prompts, responses = self.prompt_lengths.tolist(), self.response_mask.sum(1).tolist()
        parts: list[torch.Tensor] = []
        for group in groups:
            sizes: list[int] = []
            room = 0
            for row in group.tolist():
                if responses[row] > room:
                    sizes.append(0)
                    room = budget - prompts[row]
                sizes[-1] += 1
                room -= responses[row]
            parts += group.split(sizes)
        return parts


def whole_groups(size: int, group: int) -> int:
    """`size` rows, less those that would cut a group; as they are where not even one `group` fits."""
    return size - size % group if size >= group else size


def pad_sequences(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    pad_token_id: int,
    device: torch.device,
    samples: int = 1,
) -> SequenceBatch:
    """Prompts with their responses behind them, padded on the right.

    Each run of `samples` rows has one prompt in common. Raises `ValueError` for an empty prompt or response.
    """
    if not all(prompts) or not all(responses):
        raise ValueError("a prompt or a response without tokens")
    rows = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad_token_id] * (width - len(row)) for row in rows], device=device)
    begins, counts, lengths = (
        torch.tensor([len(item) for item in items], device=device).unsqueeze(1) for items in (prompts, responses, rows)
    )
    columns = torch.arange(width, device=device)
    return SequenceBatch(
        input_ids=ids,
        attention_mask=(columns < lengths).long(),
        predicting=(columns >= begins - 1) & (columns < lengths - 1),
        response_mask=torch.arange(int(counts.max()), device=device) < counts,
        prompt_index=torch.arange(len(rows), device=device) // samples,
    )


def unflattened(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What was computed at the response tokens, row by row (M,), as (B, T); 0 where the response `mask` is."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def score_in_blocks(
    batch: SequenceBatch, blocks: Sequence[torch.Tensor], forward: Callable[[SequenceBatch], Sequence[torch.Tensor]]
) -> list[torch.Tensor]:
    """What `forward` gives for the response tokens of each row: (B, T) tensors, 0 past the width of a row's block and
    in rows of no block.

    `blocks` hold row numbers.
    """
    results: list[torch.Tensor] = []
    for rows in blocks:
        for number, scores in enumerate(forward(batch.rows(rows))):
            if number == len(results):
                results.append(torch.zeros_like(batch.response_mask, dtype=scores.dtype))
            results[number][rows, : scores.shape[1]] = scores
    return results


def _halves(block: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """A block of groups as two; a single group is cut in the middle."""
    if len(block) == 1:
        (group,) = block
        half = len(group) - len(group) // 2
        return [[group[:half]], [group[half:]]]
    half = len(block) - len(block) // 2
    return [block[:half], block[half:]]
