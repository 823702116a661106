from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.models.query_score import (
    QueryFeatures,
    QueryRule,
    compose_query_scores,
    fit_query_rule,
    query_features,
)
from common.text import split_words

probabilities = st.tuples(*[st.floats(0.01, 1.0)] * 3).map(lambda raw: tuple(value / sum(raw) for value in raw))


def test_by_hand() -> None:
    words = split_words("red shoes\n\nhat")
    judged = [(0.1, 0.6, 0.3), (0.2, 0.3, 0.5), (0.5, 0.0, 0.5)]
    # No word irrelevant .9 * .8, less all of them merely relevant .6 * .3; no word, no relevance; .5 - 0.
    assert compose_query_scores(words, judged, 3) == pytest.approx([0.72 - 0.18, 0.0, 0.5])


def test_a_word_said_before_spoils_its_query() -> None:
    words = split_words("tie Tie!\ntie")
    assert compose_query_scores(words, [(0.0, 0.0, 1.0)] * 3, 2) == [0.0, 1.0]


@given(st.lists(probabilities, min_size=1, max_size=4))
def test_is_the_chance_of_a_relevant_query_over_all_labels_of_its_words(judged: list[tuple[float, ...]]) -> None:
    words = split_words(" ".join("abcd"[: len(judged)]))
    expected = sum(
        math.prod(p[label] for p, label in zip(judged, labels, strict=True))
        for labels in itertools.product(range(3), repeat=len(judged))
        if 0 not in labels and 2 in labels
    )
    assert compose_query_scores(words, judged, 1)[0] == pytest.approx(expected, abs=1e-12)


def test_features_by_hand() -> None:
    words = split_words("red shoes red\n\nhat")
    judged = [(0.1, 0.6, 0.3), (0.2, 0.3, 0.5), (0.1, 0.6, 0.3), (0.5, 0.0, 0.5)]
    first, none, last = query_features(words, judged, 3)
    # The second "red" repeats the first: irrelevant.
    assert first == pytest.approx(
        QueryFeatures(
            conjunction=0.0, mean_fit=(0.9 + 0.8) / 3, least_fit=0.0, mean_score=(0.3 + 0.3 + 0.15 + 0.5) / 3,
            one_very=1 - 0.7 * 0.5,
        )
    )
    assert none is None
    assert last == pytest.approx(QueryFeatures(0.5, 0.5, 0.5, 0.5, 0.5))


@given(st.lists(probabilities, min_size=1, max_size=5))
def test_every_feature_is_a_share(judged: list[tuple[float, ...]]) -> None:
    (found,) = query_features(split_words(" ".join("abcde"[: len(judged)])), judged, 1)
    assert all(-1e-12 <= value <= 1 + 1e-12 for value in found)


def test_a_learned_rule_is_used_in_place_of_the_conjunction() -> None:
    words, judged = split_words("red shoes\n\nhat"), [(0.1, 0.6, 0.3), (0.2, 0.3, 0.5), (0.5, 0.0, 0.5)]
    rule = QueryRule([0.0, 2.0, 0.0, 0.0, 0.0], -1.0)
    expected = [1 / (1 + math.exp(1 - 2 * 0.85)), 0.0, 1 / (1 + math.exp(1 - 2 * 0.5))]
    assert compose_query_scores(words, judged, 3, rule) == pytest.approx(expected)


def test_fitting_finds_the_rule_that_made_the_labels() -> None:
    rng = np.random.default_rng(0)
    features = rng.uniform(size=(4000, 5))
    truth = QueryRule([0.0, 3.0, -2.0, 0.0, 1.0], -0.5)
    labels = [truth(row) for row in features]
    found = fit_query_rule(features, labels)
    # The ridge draws weights in a little; the scores are what matters.
    worst = max(abs(found(row) - label) for row, label in zip(features, labels, strict=True))
    assert worst < 0.03
    drawn = fit_query_rule(features, (rng.uniform(size=4000) < labels).astype(float))
    assert max(abs(drawn(row) - label) for row, label in zip(features, labels, strict=True)) < 0.1


def test_labels_that_are_all_alike_make_a_constant_rule() -> None:
    rule = fit_query_rule([[0.1] * 5, [0.9] * 5, [0.4] * 5], [1.0, 1.0, 1.0])
    assert all(rule([value] * 5) > 0.9 for value in (0.0, 0.5, 1.0))
