"""What steers step 3 from step to step: the KL's coefficient, running normalisation, the over-optimisation rule."""

from __future__ import annotations

import pytest
import torch

from step3_tppo.advantages import whiten
from step3_tppo.kl_control import KLController
from step3_tppo.metrics import _value_metrics
from step3_tppo.monitor import OverOptimisation, calibration
from step3_tppo.normalisation import RewardNormaliser
from tests.distributed.ranks import run_on_ranks


def test_kl_controller_by_hand() -> None:
    controller = KLController(0.1, target=4.0, horizon=1000)
    controller.update(4.4, responses=100)  # 10 % above: 1 + 0.1 * 100 / 1000
    assert controller.coef == pytest.approx(0.1 * 1.01)
    controller.update(40.0, responses=100)  # the error is clipped at 20 %
    assert controller.coef == pytest.approx(0.1 * 1.01 * 1.02)
    controller.update(0.0, responses=500)
    assert controller.coef == pytest.approx(0.1 * 1.01 * 1.02 * 0.9)


def test_kl_controller_without_a_target_stays() -> None:
    controller = KLController(0.1)
    controller.update(1000.0, responses=64)
    assert controller.coef == 0.1


BATCHES = [
    (torch.tensor([[1.0, 2.0, 9.0], [3.0, -2.0, 0.5]]), torch.tensor([[True, True, False], [True, True, True]])),
    (torch.tensor([[0.0, 4.0], [-1.0, 7.0]]), torch.tensor([[True, True], [True, False]])),
]


def test_running_normalisation_divides_by_the_deviation_of_all_tokens_so_far() -> None:
    normalise = RewardNormaliser("running", max_tokens=4)
    seen: list[float] = []
    for rewards, mask in BATCHES:
        seen += rewards[mask].tolist()
        deviation = torch.tensor(seen, dtype=torch.float64).std(correction=0)
        expected = torch.where(mask, rewards / deviation, 0.0)
        torch.testing.assert_close(normalise(rewards, mask), expected.float())


def test_position_normalisation_whitens_each_place_by_all_tokens_so_far() -> None:
    normalise = RewardNormaliser("position", max_tokens=4)
    for rewards, mask in BATCHES[:1]:
        normalised = normalise(rewards, mask)
    # Place 0 holds 1 and 3: mean 2, deviation 1. Place 1 holds 2 and -2. Place 2 holds 0.5 alone: it becomes 0.
    assert normalised.tolist() == [pytest.approx([-1, 1, 0]), pytest.approx([1, -1, 0])]
    # Next, place 0 holds 1, 3, 0, -1: mean 0.75, variance (1 + 9 + 0 + 1) / 4 - 0.5625.
    rewards, mask = BATCHES[1]
    deviation = (11 / 4 - 0.5625) ** 0.5
    assert normalise(rewards, mask)[:, 0].tolist() == pytest.approx([-0.75 / deviation, -1.75 / deviation])


@pytest.mark.parametrize(
    ("mode", "expected"), [("running", [[-1.0, 0.0], [-1.0, -1.0]]), ("position", [[0.0, 0.0], [0.0, 0.0]])]
)
def test_equal_rewards_are_not_divided_until_there_is_a_deviation(mode: str, expected: list[list[float]]) -> None:
    """A reward of -1 must not become -10,000 because the first responses have the same."""
    mask = torch.tensor([[True, False], [True, True]])
    normalise = RewardNormaliser(mode, max_tokens=2)
    assert normalise(torch.full((2, 2), -1.0), mask).tolist() == expected
    # 0.1 is no binary fraction: the sums of equal values are not exactly equal.
    for value in (0.1, 1e-6, 1e6):
        one = RewardNormaliser(mode, max_tokens=2)(torch.full((2, 2), value), mask)
        torch.testing.assert_close(one, torch.where(mask, value if mode == "running" else 0.0, 0.0))
    single = RewardNormaliser(mode, max_tokens=1)(torch.tensor([[3.0]]), torch.tensor([[True]]))
    assert single.item() == (3.0 if mode == "running" else 0.0)
    # A deviation that is small, but one: 1e-5 around 0.
    small = RewardNormaliser("running", max_tokens=2)(torch.tensor([[1e-5, -1e-5]]), torch.tensor([[True, True]]))
    torch.testing.assert_close(small, torch.tensor([[1.0, -1.0]]))


def test_equal_values_are_whitened_to_zero() -> None:
    for value in (0.1, -1e6, 0.0):
        equal = whiten(torch.full((3, 2), value), torch.ones(3, 2, dtype=torch.bool))
        torch.testing.assert_close(equal, torch.zeros(3, 2), atol=1e-4, rtol=0)
    assert whiten(torch.tensor([[5.0]]), torch.tensor([[True]])).item() == 0.0
    assert whiten(torch.tensor([[5.0]]), torch.tensor([[False]])).item() == 0.0


@pytest.mark.parametrize("value", [0.1, 0.0, 1e5 + 0.1])
def test_equal_returns_have_no_variance_to_explain(value: float) -> None:
    mask = torch.ones(3, 2, dtype=torch.bool)
    returns = torch.full((3, 2), value)
    advantages = torch.tensor([[0.1, -0.2], [0.3, 0.0], [0.5, 0.7]])
    assert _value_metrics(returns, advantages, mask)["value/explained_variance"] == 0.0
    spread = torch.tensor([[1.0, -1.0], [1.0, -1.0], [1.0, -1.0]])
    returns = returns + spread
    half = _value_metrics(returns, spread / 2, mask)
    assert half["value/explained_variance"] == pytest.approx(0.75, rel=1e-3)
    perfect = _value_metrics(returns, torch.zeros(3, 2), mask)
    assert perfect["value/explained_variance"] == pytest.approx(1.0)
    assert perfect["value/returns_std"] == pytest.approx(1.0, rel=1e-3)  # also beside a mean of 100,000


def test_normalisation_goes_on_from_its_state_and_none_changes_nothing() -> None:
    whole, first = (RewardNormaliser("position", max_tokens=4) for _ in range(2))
    whole(*BATCHES[0])
    first(*BATCHES[0])
    second = RewardNormaliser("position", max_tokens=4)
    second.restore(first.state())
    assert torch.equal(whole(*BATCHES[1]), second(*BATCHES[1]))
    assert torch.equal(RewardNormaliser("none", 4)(*BATCHES[0]), BATCHES[0][0])


def _normalised(rank: int, world_size: int) -> list[list[float]]:
    normalise = RewardNormaliser("running", max_tokens=4)
    rewards, mask = BATCHES[0]
    return normalise(rewards[rank::world_size], mask[rank::world_size]).tolist()


@pytest.mark.distributed
def test_normalisation_is_by_the_tokens_of_all_ranks() -> None:
    expected = RewardNormaliser("running", max_tokens=4)(*BATCHES[0]).tolist()
    assert [rows[0] for rows in run_on_ranks(_normalised, 2)] == [pytest.approx(row) for row in expected]


def test_over_optimisation_needs_a_fall_of_the_judge_and_none_of_the_reward() -> None:
    def stops(judge: list[float], reward: list[float]) -> list[int]:
        rule, found = OverOptimisation(0.05), []
        for step, (relevance_rate, score) in enumerate(zip(judge, reward, strict=True)):
            rule.learn(relevance_rate, score)
            if rule.found():
                found.append(step)
        return found

    rise, fall = [0.3] * 10 + [0.5] * 10, [0.4] * 10
    # Ten steps at .5, then at .4: the mean is more than .05 below its best once six of ten are at .4.
    assert stops(rise + fall, [float(step) for step in range(30)])[0] == 25
    assert stops(rise + fall, [-float(step) for step in range(30)]) == []
    assert stops(rise, [0.0] * 20) == []


def test_over_optimisation_resumes_and_without_a_margin_never_stops() -> None:
    judge = [0.5] * 10 + [0.1] * 20
    rule, never = OverOptimisation(0.05), OverOptimisation(0.0)
    for value in judge[:15]:
        rule.learn(value, 1.0)
        never.learn(value, 1.0)
    resumed = OverOptimisation(0.05)
    resumed.restore(rule.state())
    found = []
    for value in judge[15:]:
        for each in (rule, resumed, never):
            each.learn(value, 1.0)
        found.append(rule.found())
        assert (resumed.found(), never.found()) == (rule.found(), False)
    assert found[0] is False and found[-1] is True


def test_calibration_by_hand() -> None:
    # Bins of 0.2: 0.1 and 0.15 share one (gaps 0.1 and -0.85), 1.9 has its own (gap -0.1).
    gap, error = calibration([0.1, 0.15, 1.9], [0, 1, 2])
    assert gap == pytest.approx((0.1 - 0.85 - 0.1) / 3)
    assert error == pytest.approx((abs(0.1 - 0.85) + 0.1) / 3)
