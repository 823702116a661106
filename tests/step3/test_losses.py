from __future__ import annotations

import math

import pytest
import torch

from step3_tppo.losses import k1_kl, kl_estimate, policy_loss, token_denominator, value_loss


def test_policy_loss_by_hand() -> None:
    """rho = 1.5, 0.5, 1.1 and one masked token; eps 0.2; A = 2, -1, -3."""
    old = torch.zeros(1, 4)
    new = torch.log(torch.tensor([[1.5, 0.5, 1.1, 9.0]]))
    advantages = torch.tensor([[2.0, -1.0, -3.0, 100.0]])
    mask = torch.tensor([[True, True, True, False]])
    result = policy_loss(new, old, advantages, mask, 0.2, torch.tensor(3.0))
    # min(3, 1.2*2) = 2.4 (clipped); min(-0.5, -0.8) = -0.8 (clipped); min(-3.3, -3.3) = -3.3
    assert float(result.loss) == pytest.approx(-(2.4 - 0.8 - 3.3) / 3, rel=1e-6)
    assert int(result.clipped) == 2
    k3 = sum(rho - 1 - math.log(rho) for rho in (1.5, 0.5, 1.1))
    assert float(result.approx_kl) == pytest.approx(k3, rel=1e-5)
    assert float(result.max_ratio) == pytest.approx(1.5, rel=1e-6)


def test_policy_gradient_at_ratio_one_is_the_advantage_times_the_score() -> None:
    new = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    advantages = torch.tensor([[0.7, -0.3]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    policy_loss(new, new.detach().clone(), advantages, mask, 0.2, torch.tensor(2.0)).loss.backward()
    assert new.grad.tolist()[0] == pytest.approx([-0.35, 0.15], rel=1e-6)


def test_clipped_tokens_have_no_gradient() -> None:
    new = torch.log(torch.tensor([[1.5, 0.5]])).requires_grad_()
    policy_loss(
        new, torch.zeros(1, 2), torch.tensor([[1.0, -1.0]]), torch.ones(1, 2).bool(), 0.2, torch.tensor(2.0)
    ).loss.backward()
    assert new.grad.tolist() == [[0.0, 0.0]]


def test_value_loss_by_hand() -> None:
    """V = 2, V_old = 1, eps 0.2: clipped value 1.2. Returns 3 and 1.5; the larger error of both counts."""
    values = torch.tensor([[2.0, 2.0, 50.0]])
    old = torch.tensor([[1.0, 1.0, 0.0]])
    returns = torch.tensor([[3.0, 1.5, 0.0]])
    mask = torch.tensor([[True, True, False]])
    result = value_loss(values, old, returns, mask, 0.2, torch.tensor(2.0))
    # max((2-3)^2, (1.2-3)^2) = 3.24 (clip active); max((2-1.5)^2, (1.2-1.5)^2) = 0.25
    assert float(result.loss) == pytest.approx(0.5 * (3.24 + 0.25) / 2, rel=1e-6)
    assert int(result.clipped) == 1


def test_masked_tokens_reach_neither_loss_nor_gradient() -> None:
    mask = torch.tensor([[True, False]])
    new = torch.tensor([[-1.0, float("nan")]], requires_grad=True)
    values = torch.tensor([[1.0, float("nan")]], requires_grad=True)
    filled = torch.tensor([[0.5, float("nan")]])
    loss = (
        policy_loss(new, filled, filled, mask, 0.2, torch.tensor(1.0)).loss
        + value_loss(values, filled, filled, mask, 0.2, torch.tensor(1.0)).loss
    )
    loss.backward()
    assert torch.isfinite(loss)
    assert new.grad[0, 1] == 0 and values.grad[0, 1] == 0
    assert new.grad[0, 0] != 0 and values.grad[0, 0] != 0


def test_kl_of_a_policy_to_itself_is_zero_and_masked_elsewhere() -> None:
    logprobs = torch.tensor([[-1.0, -2.0]])
    mask = torch.tensor([[True, False]])
    assert k1_kl(logprobs, logprobs, mask).tolist() == [[0.0, 0.0]]
    assert k1_kl(logprobs, logprobs - 0.5, mask).tolist() == [[0.5, 0.0]]


def test_denominator_counts_the_tokens_of_a_lone_rank_and_is_never_0() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert float(token_denominator(mask)) == 3
    assert float(token_denominator(torch.zeros_like(mask))) == 1


def _policy(ratios: list[float], advantages: list[float], **options: float) -> tuple[float, int, list[float]]:
    """Loss times tokens, clipped tokens and gradient to the log-probs, of unmasked tokens with these ratios."""
    new = torch.log(torch.tensor([ratios], dtype=torch.float64)).requires_grad_()
    mask = torch.ones(1, len(ratios), dtype=torch.bool)
    result = policy_loss(
        new, torch.zeros_like(new), torch.tensor([advantages], dtype=torch.float64), mask, 0.2, torch.tensor(1.0),
        **options,
    )
    result.loss.backward()
    return float(result.loss), int(result.clipped), new.grad[0].tolist()


def test_clip_higher_moves_the_upper_bound_alone() -> None:
    # Ratios 1.25 and 0.7: the upper bound 1.28 lets the first through, the lower one stays at 0.8.
    assert _policy([1.25, 0.7], [1.0, -1.0]) == (pytest.approx(-(1.2 - 0.8)), 2, [0.0, 0.0])
    loss, clipped, gradient = _policy([1.25, 0.7], [1.0, -1.0], clip_range_high=0.28)
    assert (loss, clipped) == (pytest.approx(-(1.25 - 0.8)), 1)
    assert gradient == pytest.approx([-1.25, 0.0])


def test_dual_clip_bounds_negative_advantages_alone() -> None:
    # A = -2 at ratio 5 would cost 10; c = 3 bounds it at 6. A = 2 at ratio 5 is clipped at 1.2 either way.
    assert _policy([5.0, 5.0], [-2.0, 2.0])[0] == pytest.approx(10 - 2.4)
    loss, clipped, gradient = _policy([5.0, 5.0], [-2.0, 2.0], dual_clip=3.0)
    assert (loss, clipped) == (pytest.approx(6 - 2.4), 2)
    assert gradient == [0.0, 0.0]
    assert _policy([2.5], [-2.0], dual_clip=3.0)[0] == pytest.approx(5.0)


@pytest.mark.parametrize(("estimator", "expected"), [("k1", 0.7), ("k2", 0.245), ("k3", math.exp(-0.7) - 1 + 0.7)])
def test_kl_estimates_by_hand(estimator: str, expected: float) -> None:
    mask = torch.tensor([[True, False]])
    estimate = kl_estimate(torch.tensor([[-1.0, float("nan")]]), torch.tensor([[-1.7, 0.0]]), mask, estimator)
    assert estimate.tolist()[0] == pytest.approx([expected, 0.0], rel=1e-5)


def test_kl_estimators_against_the_distributions() -> None:
    """Over all outcomes: k1 and k3 have the KL as their mean, and k2 as a loss has the KL's gradient."""
    logits = torch.tensor([0.3, -1.2, 0.8, 0.1], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.5, 0.1, -0.4, 0.0], dtype=torch.float64).log_softmax(0)
    logprobs = logits.log_softmax(0)
    probabilities = logprobs.exp()
    kl = (probabilities * (logprobs - reference)).sum()
    (wanted,) = torch.autograd.grad(kl, logits, retain_graph=True)
    mask = torch.ones(4, dtype=torch.bool)
    for estimator in ("k1", "k3"):
        mean = (probabilities * kl_estimate(logprobs, reference, mask, estimator)).sum()
        assert float(mean) == pytest.approx(float(kl), rel=1e-12)
    gradients = {}
    for estimator in ("k1", "k2"):
        loss = (probabilities.detach() * kl_estimate(logprobs, reference, mask, estimator)).sum()
        (gradients[estimator],) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert gradients["k2"].tolist() == pytest.approx(wanted.tolist(), rel=1e-10)
    assert gradients["k1"].abs().max() < 1e-12
