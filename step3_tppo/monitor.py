"""Reward against judgement while the policy learns: is the reward model still to be trusted?

A policy that has learnt to please the reward model keeps raising its reward after the answers have stopped getting
better (Gao et al. 2023). An annotator that judges the rollouts themselves shows the gap, and may end the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from common.engine.distributed import sum_over_ranks
from common.evaluation.over_optimisation import over_optimised
from common.evaluation.summary import MEASURES, Row, measure_table, score_rows
from common.feedback.annotator import Annotator
from step3_tppo.rewards import MAX_WORD_SCORE
from step3_tppo.rollout import Rollout, response_rows

BINS = 10


class Judgement(NamedTuple):
    """`judge/...` scalars over all ranks, and the scored rows of this rank's responses (`score_rows`)."""

    scalars: dict[str, float]
    rows: list[Row]


class RolloutMonitor:
    """Has an annotator judge each rollout. Every rank must call it."""

    def __init__(self, annotator: Annotator, num_queries: int) -> None:
        self._annotator = annotator
        self._k = num_queries

    def __call__(self, rollout: Rollout) -> Judgement:
        """Judge all of a rollout.

        The scalars: `relevance_rate`, `mean_word_score`; `word_gap`, the reward model's mean word score less the
        judge's (0..2); and `word_calibration_error`, the mean distance of the two within ten bins of the former,
        weighted by words.
        """
        scored = rollout.judged or score_rows(rollout.examples, response_rows(rollout.generated), self._annotator)
        table = measure_table(rollout.examples, scored, self._k)
        columns = [MEASURES.index(name) for name in ("relevance_rate", "mean_word_score")]
        judged = [score for row in scored for line in row["words"] for score in line]
        predicted = [score for scores in rollout.word_scores for score in scores]
        means = torch.tensor([*table[:, columns].sum(0), len(scored)], dtype=torch.float64)
        relevance, words, count = sum_over_ranks(means).tolist()
        gap, error = calibration(predicted, judged)
        scalars = {
            "judge/relevance_rate": relevance / count,
            "judge/mean_word_score": words / count,
            "judge/word_gap": gap,
            "judge/word_calibration_error": error,
        }
        return Judgement(scalars, scored)


class OverOptimisation:
    """Tells when to stop: the judge's mean over ten steps has fallen by `margin` from its best, the reward's has not.

    `margin` is in units of the relevance rate; 0 never stops.
    """

    def __init__(self, margin: float) -> None:
        self._margin = margin
        self._history: list[tuple[float, float]] = []

    def learn(self, relevance_rate: float, reward: float) -> None:
        """Take in one step's numbers."""
        self._history.append((relevance_rate, reward))

    def found(self) -> bool:
        """Whether the run should end here."""
        if self._margin <= 0:
            return False
        judged, rewards = ([pair[place] for pair in self._history] for place in (0, 1))
        return over_optimised(judged, rewards, self._margin)

    def state(self) -> list[tuple[float, float]]:
        """What a checkpoint must hold."""
        return self._history

    def restore(self, state: Sequence[Sequence[float]]) -> None:
        """Go on from a checkpoint's `state()`."""
        self._history = [(relevance, reward) for relevance, reward in state]


def calibration(predicted: Sequence[float], judged: Sequence[int]) -> tuple[float, float]:
    """Mean of predicted - judged, and its absolute value by bin of the predicted score, over the words of all ranks."""
    scores = torch.tensor(predicted, dtype=torch.float64)
    gaps = scores - torch.tensor(judged, dtype=torch.float64)
    bins = (scores * BINS / MAX_WORD_SCORE).long().clamp(0, BINS - 1)
    sums = torch.zeros(2, BINS, dtype=torch.float64)
    sums[0].index_add_(0, bins, gaps)
    sums[1].index_add_(0, bins, torch.ones_like(gaps))
    gap_sums, counts = sum_over_ranks(sums)
    words = counts.sum().clamp(min=1.0)
    return float(gap_sums.sum() / words), float(gap_sums.abs().sum() / words)
