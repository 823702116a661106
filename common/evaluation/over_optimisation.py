"""The rule that tells over-optimisation: the judge turns away while the reward does not (Gao et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence

WINDOW = 10  # steps that are averaged: the relevance of one step's 64 responses alone is off by 2 to 4 points


def over_optimised(judged: Sequence[float], rewards: Sequence[float], margin: float) -> bool:
    """Whether the judge's mean over the last `WINDOW` steps is more than `margin` below its best mean over as many
    steps, and the reward's is not below what it was then. Never with fewer than two windows; both lists by step."""
    if len(judged) < 2 * WINDOW:
        return False
    smooth = [
        (sum(judged[end - WINDOW : end]) / WINDOW, sum(rewards[end - WINDOW : end]) / WINDOW)
        for end in range(WINDOW, len(judged) + 1)
    ]
    best = max(smooth)
    return best[0] - smooth[-1][0] > margin and smooth[-1][1] >= best[1]
