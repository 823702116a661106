"""PPO's losses at every token. All tensors are (B, T) over response tokens; docs/method.md, section 5.

Each loss is a **sum** over the response tokens of a micro-batch divided by `tokens`, the response tokens of the whole
optimiser step over all ranks. A mean of micro-batch means would weigh a token in a short micro-batch more than one
in a long (OpenRLHF `utils/loss_utils.py`, issue 1249); see `token_denominator`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from common.engine.distributed import sum_over_ranks, world_size

MAX_LOG_RATIO = 20.0

KLEstimator = Literal["k1", "k2", "k3"]


class PolicyLoss(NamedTuple):
    """The policy's loss and what tells whether the update is sane; all but `loss` are sums over masked tokens."""

    loss: torch.Tensor
    clipped: torch.Tensor
    approx_kl: torch.Tensor
    max_ratio: torch.Tensor


class ValueLoss(NamedTuple):
    """The critic's loss and the number of masked tokens where the clip was active."""

    loss: torch.Tensor
    clipped: torch.Tensor


def token_denominator(mask: torch.Tensor) -> torch.Tensor:
    """What to divide each micro-batch's sum by, given this rank's mask of the **whole optimiser step** (any shape).

    DeepSpeed averages gradients over ranks; that is multiplied out here, so that what is optimised is the sum over all
    tokens divided by their number on all ranks, in however many micro-batches (`common.engine.accumulation`).
    """
    return sum_over_ranks(mask.sum().double()).clamp(min=1.0) / world_size()


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    clip_range: float,
    tokens: torch.Tensor,
    clip_range_high: float = 0.0,
    dual_clip: float = 0.0,
) -> PolicyLoss:
    """`-sum m min(rho A, clip(rho, 1-eps, 1+eps_high) A) / tokens`, `rho = exp(logprob - old logprob)`.

    `clip_range_high` is eps_high (clip-higher, DAPO 2025), 0 for eps. `dual_clip` c > 1 keeps the objective of a
    negative advantage at `c A` or above (Ye et al. 2020, equation 5): a ratio far above 1 would make it unbounded; 0
    leaves that out. `approx_kl` is `(rho - 1) - log rho` (k3; Schulman 2020, as in CleanRL). The log ratio is clamped
    to +-20.
    """
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    advantages = torch.where(mask, advantages, 0.0)
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip_range, 1 + (clip_range_high or clip_range)) * advantages
    objective = torch.minimum(unclipped, clipped)
    if dual_clip > 0:
        objective = torch.where(advantages < 0, torch.maximum(objective, dual_clip * advantages), objective)
    with torch.no_grad():
        approx_kl = torch.where(mask, ratio - 1 - log_ratio, 0.0).sum()
        active = (objective != unclipped).sum()
        max_ratio = torch.where(mask, ratio, 0.0).max()
    return PolicyLoss(-objective.sum() / tokens, active, approx_kl, max_ratio)


def value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor,
    clip_range: float,
    tokens: torch.Tensor,
) -> ValueLoss:
    """`0.5 sum m max((V - ret)^2, (clip(V, V_old +- eps) - ret)^2) / tokens`."""
    difference = torch.where(mask, values - returns, 0.0)
    clipped_values = old_values + (values - old_values).clamp(-clip_range, clip_range)
    clipped_difference = torch.where(mask, clipped_values - returns, 0.0)
    squared, clipped_squared = difference.square(), clipped_difference.square()
    with torch.no_grad():
        active = (clipped_squared > squared).sum()
    return ValueLoss(0.5 * torch.maximum(squared, clipped_squared).sum() / tokens, active)


def k1_kl(logprobs: torch.Tensor, reference_logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`log pi - log pi_ref` of each sampled token: an unbiased estimate of the KL when it stands in the reward."""
    return kl_estimate(logprobs, reference_logprobs, mask, "k1")


def kl_estimate(
    logprobs: torch.Tensor, reference_logprobs: torch.Tensor, mask: torch.Tensor, estimator: KLEstimator
) -> torch.Tensor:
    """Estimate of `KL(pi || pi_ref)` at each sampled token (Schulman 2020), 0 where masked; d = log pi - log pi_ref.

    `k1` is d, `k2` is d^2 / 2, `k3` is exp(-d) - 1 + d. As a value k1 and k3 are unbiased; as a **loss** k2 has the
    gradient of the KL, k1 has none in expectation and k3 that of the reversed KL. d is clamped to +-20.
    """
    difference = torch.where(mask, logprobs - reference_logprobs, 0.0)
    if estimator == "k1":
        return difference
    difference = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if estimator == "k2":
        return 0.5 * difference.square()
    return torch.expm1(-difference) + difference
