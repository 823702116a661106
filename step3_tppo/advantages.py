"""From rewards and values to advantages and returns. All tensors are (B, T) over response tokens.

Notation: r rewards, V values with V_t the value of the state before token t, m the response mask (True for the tokens
that the actor chose, EOS included; right-padded), gamma the discount, lam GAE's lambda.
"""

from __future__ import annotations

import torch

from common.engine.distributed import sum_over_ranks


def generalized_advantages(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """GAE (Schulman et al. 2016): `A_t = sum_l (gamma lam)^l delta_{t+l}`, `delta_t = r_t + gamma V_{t+1} - V_t`.

    The value after a response's last token is 0: the answer ends there, by EOS or by the length limit (whose cost is
    in the reward). Returns advantages and returns `A + V`, both (B, T) and 0 where the mask is False; what stands at
    masked places of `rewards` and `values` has no influence.
    """
    keep = mask.to(values.dtype)
    # torch.where and not a product: a masked place may hold NaN.
    rewards = torch.where(mask, rewards, 0.0)
    values = torch.where(mask, values, 0.0)
    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    deltas = (rewards + gamma * next_values - values) * keep
    advantages = torch.zeros_like(values)
    running = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        running = deltas[:, t] + gamma * lam * running
        advantages[:, t] = running
    return advantages, (advantages + values) * keep


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
