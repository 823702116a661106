"""From rewards and values to advantages and returns; docs/method.md, section 5. All tensors are (B, T) over response
tokens.

Notation: r rewards, V values with V_t the value of the state before token t, m the response mask (True for the tokens
that the actor chose, EOS included; right-padded), gamma_t the discount of what follows token t, lam GAE's lambda.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from common.alignment import NO_LINE
from common.engine.distributed import sum_over_ranks


def generalized_advantages(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: torch.Tensor | float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """GAE (Schulman et al. 2016): `A_t = delta_t + gamma_t lam A_{t+1}`, `delta_t = r_t + gamma_t V_{t+1} - V_t`.

    The value after a response's last token is 0: the answer ends there, by EOS or by the length limit (whose cost is
    in the reward). Returns advantages and returns `A + V`, both (B, T) and 0 where the mask is False; what stands at
    masked places of `rewards` and `values` has no influence.
    """
    gamma = torch.as_tensor(gamma, dtype=values.dtype, device=values.device).expand_as(values)
    keep = mask.to(values.dtype)
    # torch.where and not a product: a masked place may hold NaN.
    rewards = torch.where(mask, rewards, 0.0)
    values = torch.where(mask, values, 0.0)
    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    deltas = (rewards + gamma * next_values - values) * keep
    advantages = torch.zeros_like(values)
    running = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        running = deltas[:, t] + gamma[:, t] * lam * running
        advantages[:, t] = running
    return advantages, (advantages + values) * keep


def group_advantages(
    rewards: torch.Tensor, mask: torch.Tensor, gamma: torch.Tensor, steps: torch.Tensor, samples: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages without a critic: `A_t = G_t - mean of the other responses' G`, and the returns `G`.

    `G_t = r_t + gamma_t G_{t+1}` is the reward-to-go; with `line_gamma` 0 it ends with the query. Each run of `samples`
    rows are the responses to one prompt. The baseline of token t is the mean reward-to-go of the other responses where
    they have written as many tokens of the same line (`steps`, see `line_steps`); it is 0 where no other response has.
    It does not depend on the token, so the gradient stays unbiased. This is RLOO's leave-one-out baseline (Ahmadian et
    al. 2024), taken at each token and not once a response. All are (B, T), 0 where masked.
    """
    returns = torch.zeros_like(rewards)
    running = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        running = torch.where(mask[:, t], rewards[:, t] + gamma[:, t] * running, 0.0)
        returns[:, t] = running
    width = int(steps.max()) + 1
    group = torch.arange(len(rewards), device=rewards.device).unsqueeze(1) // samples
    cells = (group * width + steps)[mask]
    sums, counts = (
        torch.zeros(len(rewards) * width, dtype=rewards.dtype, device=rewards.device).scatter_add(0, cells, values)
        for values in (returns[mask], torch.ones_like(returns[mask]))
    )
    others = (sums[cells] - returns[mask]) / (counts[cells] - 1).clamp(min=1.0)
    advantages = torch.zeros_like(returns).masked_scatter(mask, returns[mask] - others)
    return advantages, returns


def line_steps(query_of_token: Sequence[Sequence[int]], mask: torch.Tensor) -> torch.Tensor:
    """Where each token stands in its list, (B, T) int64: one number for each pair of a line and a number of tokens that
    the line has before it. A line break, a token without a query, ends a line."""
    width = mask.shape[1]
    steps = torch.zeros(mask.shape, dtype=torch.long)
    for row, lines in zip(steps, query_of_token, strict=True):
        line = begin = 0
        for t, query in enumerate(lines):
            row[t] = line * width + t - begin
            if query == NO_LINE:
                line, begin = line + 1, t + 1
    return steps.to(mask.device)


def token_discounts(
    query_of_token: Sequence[Sequence[int]], values: torch.Tensor, gamma: float, line_gamma: float
) -> torch.Tensor:
    """gamma_t (B, T) for `values` (B, T): `gamma`, and `line_gamma` times as much after a line break.

    A line break is a token without a query in the rows of `query_of_token`. With `line_gamma` 0 each query of a list is
    an episode of its own: its tokens answer for it alone, not for those that come after it.
    """
    discounts = torch.full_like(values, gamma)
    for row, lines in zip(discounts, query_of_token, strict=True):
        breaks = [place for place, line in enumerate(lines) if line == NO_LINE]
        row[breaks] *= line_gamma
    return discounts


def whiten(values: torch.Tensor, mask: torch.Tensor, epsilon: float = 1e-8) -> torch.Tensor:
    """Zero mean and unit variance over the masked tokens of **all ranks**; 0 where the mask is False.

    Every rank must call it, also one with no token. The variance is the biased one (divided by the count), as in
    OpenRLHF's experience maker; two passes keep it exact for a large mean.
    """
    kept = torch.where(mask, values, 0.0).double()
    count, total = sum_over_ranks(torch.stack([mask.sum().double(), kept.sum()]))
    count = count.clamp(min=1.0)
    mean = total / count
    centred = torch.where(mask, values.double() - mean, 0.0)
    variance = sum_over_ranks(centred.square().sum()) / count
    return (centred * torch.rsqrt(variance + epsilon)).to(values.dtype)
