from __future__ import annotations

import math

import pytest
import torch

from step3_tppo.losses import k1_kl, policy_loss, token_denominator, value_loss


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


def test_denominator_undoes_the_division_by_accumulation_steps() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert float(token_denominator(mask, 4)) == 3 / 4
