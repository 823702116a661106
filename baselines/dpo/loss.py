"""The loss of direct preference optimisation (Rafailov et al. 2023, equation 7)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import logsigmoid


class PreferenceLoss(NamedTuple):
    """`losses` and `margins` of each pair, (P,): a pair is ranked right when its margin is above 0."""

    losses: torch.Tensor
    margins: torch.Tensor


def dpo_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    reference_chosen: torch.Tensor,
    reference_rejected: torch.Tensor,
    beta: float,
) -> PreferenceLoss:
    """`-log sigmoid(beta ((log pi/ref)(chosen) - (log pi/ref)(rejected)))`; log-probs of whole responses, all (P,)."""
    margins = beta * ((chosen - reference_chosen) - (rejected - reference_rejected))
    return PreferenceLoss(-logsigmoid(margins), margins)
