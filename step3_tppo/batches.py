"""Which prompts each rank samples for in a step, and which responses an optimizer step learns from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain

import torch

from common.data.records import Example
from common.engine import distributed
from common.models.sequences import SequenceBatch

MAX_SEED = 2**31


class PromptSampler:
    """The prompts of each step: epochs over all examples, each in its own random order.

    A rank gets `size / ranks` of a step's prompts. They are dealt by their tokens, which `count_tokens` gives, so that
    no rank waits long for another.
    """

    def __init__(
        self, examples: Sequence[Example], size: int, seed: int, count_tokens: Callable[[Example], int]
    ) -> None:
        self._examples = examples
        self._size = size
        self._seed = seed
        self._count_tokens = count_tokens
        self._order_made: tuple[int, list[int]] = (-1, [])

    def __call__(self, step: int) -> list[Example]:
        """This rank's prompts; every rank must call it."""
        picked = []
        for number in range(step * self._size, (step + 1) * self._size):
            epoch, position = divmod(number, len(self._examples))
            picked.append(self._examples[self._order(epoch)[position]])
        ranks, rank = distributed.world_size(), distributed.rank()
        if ranks == 1:
            return picked
        shares = distributed.gather_from_ranks([self._count_tokens(example) for example in picked[rank::ranks]])
        counts = list(chain.from_iterable(zip(*shares, strict=True)))
        return [picked[number] for number in deal(counts, ranks)[rank]]

    def _order(self, epoch: int) -> list[int]:
        """The examples' order in `epoch`; the last one made is kept, because a step asks for it at every prompt."""
        if self._order_made[0] != epoch:
            generator = torch.Generator().manual_seed(step_seed(self._seed, -1, epoch))
            self._order_made = (epoch, torch.randperm(len(self._examples), generator=generator).tolist())
        return self._order_made[1]


def mini_batches(batch: SequenceBatch, size: int, seed: int) -> Iterator[torch.Tensor]:
    """All rows of `batch` in random mini-batches of `size`, which divides them; the rows of a prompt stay together.

    Where whole groups fill every mini-batch they are dealt by their tokens: the mini-batch that a rank is at is about
    as long on every rank. Otherwise a group is cut where a mini-batch is full.
    """
    generator = torch.Generator().manual_seed(seed)
    groups = batch.groups(torch.arange(len(batch.input_ids), device=batch.input_ids.device))
    groups = [groups[number] for number in torch.randperm(len(groups), generator=generator).tolist()]
    parts = len(batch.input_ids) // size
    if len({len(group) for group in groups}) == 1 and size % len(groups[0]) == 0:
        dealt = deal(batch.token_counts(groups), parts)
        groups = [groups[number] for part in torch.randperm(parts, generator=generator) for number in dealt[part]]
    yield from torch.cat(groups).split(size)


def deal(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """The numbers of items with these `lengths` in `parts` of as many items each, whose sums are close together.

    The longest item that is left goes to the part with the least sum that has room. `parts` must divide the items.
    """
    dealt: list[list[int]] = [[] for _ in range(parts)]
    sums, room = [0] * parts, len(lengths) // parts
    for item in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        part = min((p for p in range(parts) if len(dealt[p]) < room), key=sums.__getitem__)
        dealt[part].append(item)
        sums[part] += lengths[item]
    return dealt


def step_seed(seed: int, *parts: int) -> int:
    """A seed that differs between steps, ranks and epochs and repeats in a resumed run."""
    return hash((seed, *parts)) % MAX_SEED
