from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from common.models.reward_metrics import classification_metrics, macro_auc, one_vs_rest_auc, sentence_metrics


def auc_by_pairs(scores: list[float], positive: list[bool]) -> float:
    above = [s for s, p in zip(scores, positive, strict=True) if p]
    below = [s for s, p in zip(scores, positive, strict=True) if not p]
    wins = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a in above for b in below)
    return wins / (len(above) * len(below)) if above and below else math.nan


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.5, 0.5001, 1.0]), st.booleans()), max_size=30))
def test_auc_equals_the_count_of_pairs(items: list[tuple[float, bool]]) -> None:
    scores, positive = [s for s, _ in items], [p for _, p in items]
    measured = one_vs_rest_auc(np.array(scores), np.array(positive, dtype=bool))
    assert measured == pytest.approx(auc_by_pairs(scores, positive), nan_ok=True)


def test_auc_by_hand() -> None:
    scores, positive = np.array([0.9, 0.8, 0.3, 0.3]), np.array([True, False, True, False])
    assert one_vs_rest_auc(scores, positive) == pytest.approx((1 + 1 + 0 + 0.5) / 4)


PROBABILITIES = np.array([[0.7, 0.2, 0.1], [0.5, 0.4, 0.1], [0.2, 0.5, 0.3], [0.3, 0.1, 0.6], [0.1, 0.6, 0.3]])


def test_classification_by_hand() -> None:
    metrics = classification_metrics(PROBABILITIES, np.array([0, 1, 1, 2, 2]))
    # Predictions 0, 0, 1, 2, 1. AUC of 0: above all four; of 1: {.4, .5} against {.2, .1, .6}; of 2: {.6, .3}
    # against {.1, .1, .3}, one tie.
    aucs = [1.0, (2 + 2) / 6, (3 + 2.5) / 6]
    assert metrics == pytest.approx(
        {"auc": sum(aucs) / 3, "accuracy": 3 / 5, "accuracy_0": 1.0, "accuracy_1": 0.5, "accuracy_2": 0.5}
    )


def test_a_class_that_does_not_occur_has_no_measure() -> None:
    labels = np.array([0, 0, 1, 1, 1])
    metrics = classification_metrics(PROBABILITIES, labels)
    assert math.isnan(metrics["accuracy_2"])
    pairs = [auc_by_pairs(PROBABILITIES[:, c].tolist(), (labels == c).tolist()) for c in (0, 1)]
    assert metrics["auc"] == pytest.approx(sum(pairs) / 2)
    assert math.isnan(macro_auc(PROBABILITIES, np.zeros(5)))
    empty = classification_metrics(np.empty((0, 3)), np.empty(0))
    assert all(math.isnan(value) for value in empty.values())


def test_sentences_by_hand() -> None:
    predicted, actual = np.array([0.1, 0.4, 0.9, 0.2]), np.array([0.0, 0.5, 1.0, 0.5])
    metrics = sentence_metrics(predicted, actual)
    assert metrics["mse"] == pytest.approx((0.01 + 0.01 + 0.01 + 0.09) / 4)
    # Ranks 1 3 4 2 against 1 2.5 4 2.5: covariance 4.5, variances 5 and 4.5.
    assert metrics["spearman"] == pytest.approx(4.5 / math.sqrt(5 * 4.5))
    assert metrics["spearman"] == pytest.approx(spearmanr(predicted, actual).statistic)


def test_constant_scores_have_no_rank_correlation() -> None:
    metrics = sentence_metrics(np.array([0.5, 0.5]), np.array([0.0, 1.0]))
    assert metrics["mse"] == pytest.approx(0.25)
    assert math.isnan(metrics["spearman"])


def test_sentence_auc_parts_relevant_queries_from_others() -> None:
    # Relevant are those labelled .5 and 1; of the four pairs only (.35, .4) is ranked wrongly.
    metrics = sentence_metrics(np.array([0.1, 0.4, 0.35, 0.8]), np.array([0.0, 0.0, 0.5, 1.0]))
    assert metrics["auc"] == 0.75
