"""Lemma 1 of the paper (docs/method.md, section 6), and what a reward at every token is for."""

from __future__ import annotations

import torch

from step3_tppo.advantages import generalized_advantages, whiten
from step3_tppo.losses import k1_kl, policy_loss


def test_a_tabular_policy_reaches_the_closed_form() -> None:
    """The maximiser of E[A - beta KL(pi || pi_ref)] is pi_ref exp(A / beta) / Z: one state, five actions.

    Every action is present once, weighted by its old probability, so that the gradient is exact and nothing is
    sampled. The k1 KL in the reward is that of docs/method.md, section 5; the baseline is the exact value of the
    state.
    """
    torch.manual_seed(0)
    beta = 0.5
    reference = torch.randn(5, dtype=torch.float64).log_softmax(0)
    rewards = torch.tensor([0.3, -0.8, 1.1, 0.0, -0.2], dtype=torch.float64)
    logits = reference.clone().requires_grad_()
    mask = torch.ones(5, 1, dtype=torch.bool)
    optimizer = torch.optim.SGD([logits], lr=2.0)
    for _ in range(3000):
        old = logits.log_softmax(0).detach()
        penalised = rewards - beta * k1_kl(old, reference, mask[:, 0])
        value = (old.exp() * penalised).sum().expand(5)
        advantages, _ = generalized_advantages(penalised[:, None], value[:, None], mask, 1.0, 0.95)
        weighted = advantages * old.exp()[:, None]
        loss = policy_loss(
            logits.log_softmax(0)[:, None], old[:, None], weighted, mask, 0.2, torch.tensor(1.0, dtype=torch.float64)
        ).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    closed_form = (reference + rewards / beta).log_softmax(0)
    # Gradient ascent on a concave problem contracts geometrically; after 3000 steps only rounding is left.
    assert torch.allclose(logits.log_softmax(0), closed_form, rtol=0, atol=1e-8)


def updates_until_solved(dense: bool, seed: int, length: int = 24, actions: int = 4, wanted: float = 0.9) -> int:
    """A bandit of `length` independent tokens in which only token 3 is worth anything: 1 for action 0.

    With `dense` the reward stands at that token, otherwise at the last; all else is the same, as in step 3: GAE with
    lambda 0.95, whitening, the clipped loss, and for a critic a running mean of each place's return. Returns the
    updates until the policy chooses the right action there with probability `wanted`.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = torch.zeros(length, actions, requires_grad=True)
    optimizer = torch.optim.SGD([logits], lr=0.1)
    values = torch.zeros(length)
    batch, key = 16, 3
    mask = torch.ones(batch, length, dtype=torch.bool)
    places = torch.arange(length).expand(batch, -1)
    for update in range(1, 5001):
        old = logits.detach().log_softmax(-1)
        chosen = torch.multinomial(old.exp(), batch, replacement=True, generator=generator).T
        rewards = torch.zeros(batch, length)
        rewards[:, key if dense else -1] = (chosen[:, key] == 0).float()
        advantages, returns = generalized_advantages(rewards, values.expand(batch, -1), mask, 1.0, 0.95)
        values = 0.9 * values + 0.1 * returns.mean(0)
        new = logits.log_softmax(-1)[places, chosen]
        loss = policy_loss(
            new, old[places, chosen], whiten(advantages, mask), mask, 0.2, torch.tensor(float(batch))
        ).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if float(logits.detach()[key].softmax(-1)[0]) > wanted:
            return update
    raise AssertionError(f"not solved in 5000 updates ({dense=}, {seed=})")


def test_token_rewards_solve_a_one_token_bandit_in_fewer_updates() -> None:
    dense = [updates_until_solved(True, seed) for seed in range(8)]
    terminal = [updates_until_solved(False, seed) for seed in range(8)]
    assert max(dense) < min(terminal), (dense, terminal)
