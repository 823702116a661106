from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.models.query_score import compose_query_scores
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
