"""What a token-level reward model is judged by: AUC and accuracy of classes, error and rank correlation of sentences.

A measure without the data it needs (a class that does not occur, constant scores) is NaN, never a made-up number.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.stats import rankdata, spearmanr

from common.feedback.annotator import RELEVANT_FROM
from common.models.reward_options import MAX_SCORE, NUM_CLASSES


def one_vs_rest_auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Chance that a positive item scores above a negative one, ties counted half (Mann-Whitney U by ranks).

    scores (N,), positive (N,) of booleans. NaN without items of both kinds.
    """
    positives = int(positive.sum())
    negatives = len(positive) - positives
    if positives == 0 or negatives == 0:
        return math.nan
    ranks = rankdata(scores)
    wins = ranks[positive].sum() - positives * (positives + 1) / 2
    return float(wins / (positives * negatives))


def macro_auc(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean over classes of each class against the rest; probabilities (N, 3), labels (N,).

    Classes that do not occur (or are the only one) are left out; NaN when none is left.
    """
    aucs = [one_vs_rest_auc(probabilities[:, label], labels == label) for label in range(NUM_CLASSES)]
    defined = [auc for auc in aucs if not math.isnan(auc)]
    return float(np.mean(defined)) if defined else math.nan


def classification_metrics(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """`auc`, `accuracy` and `accuracy_<class>` (share of the class that is recognised); shapes as in `macro_auc`."""
    right = probabilities.argmax(axis=1) == labels
    metrics = {"auc": macro_auc(probabilities, labels), "accuracy": _mean(right)}
    for label in range(NUM_CLASSES):
        metrics[f"accuracy_{label}"] = _mean(right[labels == label])
    return metrics


def sentence_metrics(predicted: np.ndarray, actual: np.ndarray) -> dict[str, float]:
    """`mse`, `spearman` and `auc` (relevant queries against others) of sentence scores in [0, 1], both (N,)."""
    varied = len(actual) > 1 and np.ptp(predicted) > 0 and np.ptp(actual) > 0
    return {
        "mse": _mean(np.square(predicted - actual)),
        "spearman": float(spearmanr(predicted, actual).statistic) if varied else math.nan,
        "auc": one_vs_rest_auc(predicted, actual >= RELEVANT_FROM / MAX_SCORE),
    }


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan
