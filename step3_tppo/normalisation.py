"""Running normalisation of the rewards, by statistics of all rollouts so far and all ranks."""

from __future__ import annotations

from typing import Literal

import torch

from common.engine.distributed import sum_over_ranks

RewardNorm = Literal["none", "running", "position"]
ROUNDING = 1e-6  # of the root mean square: a smaller deviation is that of equal values


class RewardNormaliser:
    """Scales (B, T) rewards by what has been seen, this rollout included.

    `running` divides by the standard deviation over all response tokens: signs and zeros stay. `position` takes, for
    each place in the response, the mean off and divides by the standard deviation there (the location-aware
    normalisation of DenseRewardRLHF-PPO, per place instead of by regression). `none` changes nothing. While all values
    are equal there is no deviation, and nothing is divided.
    """

    def __init__(self, mode: RewardNorm, max_tokens: int) -> None:
        self._mode = mode
        self._sums = torch.zeros(3, max_tokens, dtype=torch.float64)  # count, sum and sum of squares at each place

    def __call__(self, rewards: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Normalised rewards, 0 where the mask is False. Every rank must call it."""
        if self._mode == "none":
            return rewards
        kept = torch.where(mask, rewards, 0.0).double()
        new = torch.stack([mask.double().sum(0), kept.sum(0), kept.square().sum(0)])
        padded = torch.zeros_like(self._sums, device=rewards.device)
        padded[:, : mask.shape[1]] = new
        self._sums += sum_over_ranks(padded).cpu()
        mean, std = (values.to(rewards)[: mask.shape[1]] for values in self._moments())
        return torch.where(mask, (rewards - mean) / std, 0.0)

    def state(self) -> list[list[float]]:
        """What a checkpoint must hold."""
        return self._sums.tolist()

    def restore(self, state: list[list[float]]) -> None:
        """Go on from a checkpoint's `state()`."""
        self._sums = torch.tensor(state, dtype=torch.float64)

    def _moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What to subtract and to divide by at each place, both (max_tokens,)."""
        sums = self._sums
        if self._mode == "running":
            sums = sums.sum(1, keepdim=True).expand_as(sums)
        count = sums[0].clamp(min=1.0)
        mean = sums[1] / count
        mean_square = sums[2] / count
        std = (mean_square - mean.square()).clamp(min=0.0).sqrt()
        std = torch.where(std > ROUNDING * mean_square.sqrt(), std, 1.0)
        return (torch.zeros_like(mean) if self._mode == "running" else mean), std
