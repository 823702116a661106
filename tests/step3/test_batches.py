"""How prompts are dealt over ranks, and responses over mini-batches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.data.records import Event, Example
from common.engine import distributed
from common.models.sequences import SequenceBatch, pad_sequences
from step3_tppo.batches import PromptSampler, deal, mini_batches
from step3_tppo.metrics import imbalance
from tests.distributed.ranks import run_on_ranks


def test_items_are_dealt_by_hand() -> None:
    # 9 | 8, then 7 to the 8 and 1 to the 9; both parts are full at two.
    assert deal([9, 1, 8, 7], 2) == [[0, 1], [2, 3]]
    assert deal([5, 5, 5], 3) == [[0], [1], [2]]


@given(st.integers(1, 4), st.integers(1, 6), st.data())
def test_every_item_is_dealt_once_and_sums_are_close(parts: int, size: int, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 100), min_size=parts * size, max_size=parts * size))
    dealt = deal(lengths, parts)
    assert sorted(item for part in dealt for item in part) == list(range(len(lengths)))
    assert {len(part) for part in dealt} == {size}
    sums = [sum(lengths[item] for item in part) for part in dealt]
    assert max(sums) - min(sums) <= max(lengths)


def batch_of(groups: list[tuple[int, int]]) -> SequenceBatch:
    """Groups of two responses: tokens of the prompt, and of each response."""
    prompts = [[5] * prompt for prompt, _ in groups for _ in range(2)]
    responses = [[6] * response for _, response in groups for _ in range(2)]
    return pad_sequences(prompts, responses, 0, torch.device("cpu"), samples=2)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 12])
def test_mini_batches_hold_whole_groups_where_they_fit(size: int) -> None:
    batch = batch_of([(30, 2), (20, 3), (10, 4), (5, 1), (40, 2), (8, 8)])
    found = list(mini_batches(batch, size, seed=3))
    assert torch.cat(found).sort().values.tolist() == list(range(12))
    assert {len(rows) for rows in found} == {size}
    for rows in found:
        prompts = len({row // 2 for row in rows.tolist()})
        assert prompts == size // 2 if size % 2 == 0 else prompts <= size // 2 + 1
    assert [rows.tolist() for rows in mini_batches(batch, size, 3)] == [rows.tolist() for rows in found]
    if size < 12:  # else all rows are in the only one
        others = [[rows.tolist() for rows in mini_batches(batch, size, seed)] for seed in range(4, 8)]
        assert any(other != [rows.tolist() for rows in found] for other in others)


def test_mini_batches_have_about_as_many_tokens() -> None:
    batch = batch_of([(30, 2), (20, 3), (10, 4), (5, 1), (40, 2), (8, 8)])  # 34, 26, 18, 7, 44, 24 tokens
    for seed in range(5):
        found = mini_batches(batch, 6, seed)
        counts = [sum(batch.token_counts(batch.groups(rows))) for rows in found]
        assert sorted(counts) == [75, 78]  # 44 + 24 + 7, and 34 + 26 + 18


def example(number: int, tokens: int) -> Example:
    return Example(f"e{number}", "u", "u", "test", "train", (Event("search", query="x" * tokens),), ("y",))


def _prompts(rank: int, world_size: int, lengths: list[int], steps: int) -> list[list[str]]:
    examples = [example(number, length) for number, length in enumerate(lengths)]
    sampler = PromptSampler(examples, 4, 0, lambda example: len(example.history[0].query))
    return [[example.id for example in sampler(step)] for step in range(steps)]


@pytest.mark.distributed
def test_ranks_share_the_prompts_of_a_step_by_their_tokens() -> None:
    lengths = [1, 2, 3, 50, 51, 52, 100, 101]
    alone = _prompts(0, 1, lengths, 4)
    shares = run_on_ranks(_prompts, 2, lengths, 4)
    for step in range(4):
        mine, others = (share[step] for share in shares)
        assert len(mine) == len(others) == 2
        assert sorted(mine + others) == sorted(alone[step])
        chosen = [lengths[int(name[1:])] for name in alone[step]]
        sums = [sum(lengths[int(name[1:])] for name in share[step]) for share in shares]
        first, *middle, last = sorted(chosen)
        assert sorted(sums) == sorted([first + last, sum(middle)])
    # An epoch is two steps of four prompts: each example once.
    assert sorted(alone[0] + alone[1]) == sorted(f"e{number}" for number in range(8))


def _imbalance(rank: int, world_size: int) -> float:
    return imbalance([[30, 10], [10, 10]][rank], torch.device("cpu"))


@pytest.mark.distributed
def test_imbalance_is_what_the_longest_rank_has_beyond_the_mean() -> None:
    # 30 where the mean is 20: a half more; 10 and 10: nothing. Their mean.
    assert run_on_ranks(_imbalance, 2) == [0.25, 0.25]
    assert distributed.world_size() == 1 and imbalance([7, 9], torch.device("cpu")) == 0.0
