from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.alignment import NO_LINE
from step3_tppo.advantages import generalized_advantages, token_discounts, whiten
from tests.distributed.ranks import run_on_ranks


def gae_by_definition(
    rewards: list[float], values: list[float], gamma: float, lam: float
) -> tuple[list[float], list[float]]:
    """The double sum of the definition, one response without padding."""
    length = len(rewards)
    deltas = [
        rewards[t] + gamma * (values[t + 1] if t + 1 < length else 0.0) - values[t] for t in range(length)
    ]
    advantages = [
        sum((gamma * lam) ** (u - t) * deltas[u] for u in range(t, length)) for t in range(length)
    ]
    return advantages, [advantage + value for advantage, value in zip(advantages, values, strict=True)]


def random_batch(seed: int, rows: int = 5, width: int = 9) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    values = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, width + 1, (rows,), generator=generator)
    return rewards, values, torch.arange(width) < lengths[:, None]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), gamma=st.floats(0, 1), lam=st.floats(0, 1))
def test_gae_equals_its_definition(seed: int, gamma: float, lam: float) -> None:
    rewards, values, mask = random_batch(seed)
    advantages, returns = generalized_advantages(rewards, values, mask, gamma, lam)
    for row in range(len(rewards)):
        length = int(mask[row].sum())
        wanted, wanted_returns = gae_by_definition(
            rewards[row, :length].tolist(), values[row, :length].tolist(), gamma, lam
        )
        # float64 sums of at most 9 terms of size ~10: rounding stays under 1e-13.
        assert advantages[row, :length].tolist() == pytest.approx(wanted, abs=1e-12)
        assert returns[row, :length].tolist() == pytest.approx(wanted_returns, abs=1e-12)
        assert advantages[row, length:].abs().sum() == 0
        assert returns[row, length:].abs().sum() == 0


def test_lambda_zero_is_the_temporal_difference() -> None:
    rewards = torch.tensor([[1.0, 2.0, 4.0]])
    values = torch.tensor([[0.5, 1.0, 3.0]])
    advantages, _ = generalized_advantages(rewards, values, torch.ones(1, 3, dtype=torch.bool), 0.5, 0.0)
    assert advantages.tolist() == [[1 + 0.5 * 1 - 0.5, 2 + 0.5 * 3 - 1, 4 - 3]]


def test_lambda_one_is_the_return_minus_the_value() -> None:
    rewards = torch.tensor([[1.0, 2.0, 4.0]])
    values = torch.tensor([[0.5, 1.0, 3.0]])
    advantages, returns = generalized_advantages(rewards, values, torch.ones(1, 3, dtype=torch.bool), 0.5, 1.0)
    discounted = [1 + 0.5 * 2 + 0.25 * 4, 2 + 0.5 * 4, 4.0]
    assert returns.tolist() == [discounted]
    assert advantages.tolist() == [[discounted[0] - 0.5, discounted[1] - 1.0, discounted[2] - 3.0]]


def test_with_line_gamma_zero_each_query_is_an_episode_of_its_own() -> None:
    """A response of three lines (the last token, EOS, belongs to none) against its lines one by one."""
    rewards, values, _ = random_batch(7, rows=1)
    lines = [0, 0, NO_LINE, 1, NO_LINE, 2, 2, 2, NO_LINE]
    mask = torch.ones_like(rewards, dtype=torch.bool)
    discounts = token_discounts([lines], values, 0.9, 0.0)
    assert discounts.tolist() == [[0.9, 0.9, 0, 0.9, 0, 0.9, 0.9, 0.9, 0]]
    advantages, returns = generalized_advantages(rewards, values, mask, discounts, 0.8)
    for first, end in ((0, 3), (3, 5), (5, 9)):
        wanted = gae_by_definition(rewards[0, first:end].tolist(), values[0, first:end].tolist(), 0.9, 0.8)
        assert advantages[0, first:end].tolist() == pytest.approx(wanted[0], abs=1e-12)
        assert returns[0, first:end].tolist() == pytest.approx(wanted[1], abs=1e-12)


def test_line_gamma_one_changes_nothing() -> None:
    rewards, values, mask = random_batch(8)
    discounts = token_discounts([[0, NO_LINE, 1]] * len(values), values, 0.9, 1.0)
    plain = generalized_advantages(rewards, values, mask, 0.9, 0.8)
    assert all(map(torch.equal, generalized_advantages(rewards, values, mask, discounts, 0.8), plain))


@pytest.mark.parametrize("poison", [1e6, float("nan"), float("inf")])
def test_masked_values_change_nothing(poison: float) -> None:
    rewards, values, mask = random_batch(3)
    clean = generalized_advantages(rewards, values, mask, 0.9, 0.8)
    poisoned_rewards = torch.where(mask, rewards, poison)
    poisoned_values = torch.where(mask, values, poison)
    dirty = generalized_advantages(poisoned_rewards, poisoned_values, mask, 0.9, 0.8)
    assert torch.equal(clean[0], dirty[0])
    assert torch.equal(clean[1], dirty[1])
    assert torch.equal(whiten(clean[0], mask), whiten(torch.where(mask, clean[0], poison), mask))


def test_whitened_tokens_have_mean_zero_and_variance_one() -> None:
    values, _, mask = random_batch(5)
    white = whiten(values * 3 + 7, mask)
    kept = white[mask]
    assert float(kept.mean()) == pytest.approx(0, abs=1e-12)
    assert float(kept.var(unbiased=False)) == pytest.approx(1, abs=1e-7)
    assert white[~mask].abs().sum() == 0


def _whiten_shard(rank: int, world_size: int, shards: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    return whiten(*shards[rank])


@pytest.mark.distributed
def test_whitening_on_two_ranks_equals_whitening_of_the_whole() -> None:
    values, _, mask = random_batch(11, rows=6)
    for cut in (2, 6):  # uneven shards, and one rank without any token
        first = (values[:cut], mask[:cut])
        second = (values[cut:], mask[cut:]) if cut < 6 else (torch.zeros(1, 9).double(), torch.zeros(1, 9).bool())
        white = run_on_ranks(_whiten_shard, 2, [first, second])
        whole = whiten(values, mask)
        together = torch.cat(white)[:6]
        # The ranks add the same float64 numbers in another order.
        assert torch.allclose(together, whole, rtol=0, atol=1e-12)
