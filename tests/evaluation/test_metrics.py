"""Every measure against a table made by hand (k = 3 unless said otherwise)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.evaluation import metrics
from common.text import split_queries

K = 3


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([2, 1, 0], 2 / 3),
        ([1, 1, 1], 1.0),
        ([2], 1 / 3),  # two lines are missing
        ([], 0.0),
        ([0, 0, 0, 2, 2], 0.0),  # what is past the k-th line does not count
    ],
)
def test_relevance_rate(scores: list[int], expected: float) -> None:
    assert metrics.relevance_rate(scores, K) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("queries", "scores", "expected"),
    [
        (["red shoes", "blue hat", "green coat"], [2, 1, 1], 1.0),
        (["red shoes", "Red  SHOES!", "blue hat"], [2, 2, 0], 1 / 3),
        (["red shoes", "red shoes", "red shoes"], [0, 2, 2], 0.0),  # a repeat of an irrelevant line is a repeat too
        (["a", "b", "c", "a"], [1, 1, 1, 2], 1.0),
        (["red shoes"], [2], 1 / 3),
    ],
)
def test_unique_relevance_rate(queries: list[str], scores: list[int], expected: float) -> None:
    assert metrics.unique_relevance_rate(queries, scores, K) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([[2, 1], [0], [1, 1, 1]], 6 / 6),
        ([[2, 2], [], [0]], 4 / 3),
        ([[], []], 0.0),
        ([], 0.0),
        ([[0], [0], [1], [2, 2, 2]], 1 / 3),
    ],
)
def test_mean_word_score(words: list[list[int]], expected: float) -> None:
    assert metrics.mean_word_score(words, K) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("queries", "targets", "expected"),
    [
        (["red shoes", "blue hat", "x"], ["Red shoes.", "green coat"], 1 / 2),
        (["red shoes", "red shoes", "red shoes"], ["red shoes", "RED shoes", "hat", "coat"], 1 / 3),
        (["a", "b", "c", "hat"], ["hat"], 0.0),
        ([], ["hat"], 0.0),
        (["", "?"], ["!!"], None),  # a target without a word can be neither hit nor missed
        (["hat"], [], None),
    ],
)
def test_target_recall(queries: list[str], targets: list[str], expected: float | None) -> None:
    assert metrics.target_recall(queries, targets, K) == pytest.approx(expected)


def test_new_and_repeated_targets() -> None:
    new, repeated = metrics.new_and_repeated(["Red Shoes", "blue hat", "coat?"], ["red shoes", "coat", "tie"])
    assert (new, repeated) == (["blue hat"], ["Red Shoes", "coat?"])


@pytest.mark.parametrize(
    ("prediction", "target", "expected"),
    [
        ("red shoes", "shoes, RED", 1.0),
        ("red red shoes", "red shoes", 2 * 2 / (3 + 2)),
        ("red red shoes", "red red", 2 * 2 / (3 + 2)),
        ("cheap red shoes", "red hat", 2 * 1 / (3 + 2)),
        ("red", "hat", 0.0),
        ("", "hat", 0.0),
        ("", "", 1.0),
    ],
)
def test_token_f1(prediction: str, target: str, expected: float) -> None:
    assert metrics.token_f1(prediction, target) == pytest.approx(expected)


def test_token_f1_is_the_harmonic_mean_of_precision_and_recall() -> None:
    precision, recall = 2 / 5, 2 / 3
    value = metrics.token_f1("buy cheap red shoes online", "red shoes women")
    assert value == pytest.approx(2 * precision * recall / (precision + recall))


@pytest.mark.parametrize(
    ("queries", "targets", "expected"),
    [
        (["red shoes", "hat", "x"], ["red shoes", "blue hat"], (1.0 + 2 / 3) / 2),
        (["red shoes", "hat", "x"], ["red shoes", "Red shoes", "blue hat"], (1.0 + 2 / 3) / 2),
        (["a", "b", "c", "hat"], ["hat"], 0.0),
        ([], ["hat"], 0.0),
        (["hat"], [], None),
    ],
)
def test_best_match_f1(queries: list[str], targets: list[str], expected: float | None) -> None:
    assert metrics.best_match_f1(queries, targets, K) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("queries", "expected"),
    [
        (["Red shoes!", "blue hat", "coat"], 1 / 3),
        (["red shoes", "", "tie"], 1.0),  # the empty line is not a written query
        (["a", "b", "c", "tie"], 0.0),
        (["", ""], None),
        ([], None),
    ],
)
def test_copy_rate(queries: list[str], expected: float | None) -> None:
    assert metrics.copy_rate(queries, ["red shoes", "tie"], K) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("queries", "expected"),
    [
        (["a", "b", "c"], 0.0),
        (["a", "A.", "a"], 2 / 3),
        (["a", "", "a"], 1 / 2),
        (["a", "b", "c", "a"], 0.0),
        ([""], None),
    ],
)
def test_duplicate_rate(queries: list[str], expected: float | None) -> None:
    assert metrics.duplicate_rate(queries, K) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("queries", "expected"),
    [(["red shoes", "hat - blue", ""], 2.0), (["a b c", "d"], 2.0), (["東京 hotel"], 3.0), ([], None)],
)
def test_words_per_query(queries: list[str], expected: float | None) -> None:
    assert metrics.words_per_query(queries, K) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("response", "finished", "error"),
    [
        ("a\nb\nc", True, False),
        ("a\nb\nc\n", True, False),
        ("a\nb\nc", False, True),
        ("a\nb", True, True),
        ("a\nb\nc\nd", True, True),
        ("a\n\nb", True, True),
        ("a\n\nb\nc", True, True),  # an empty line among three queries
        ("", True, True),
    ],
)
def test_format_error(response: str, finished: bool, error: bool) -> None:
    assert metrics.has_format_error(split_queries(response), finished, K) is error


def test_distinct_n() -> None:
    responses = [["red shoes", "red hat"], ["Red shoes", "tie", "x", "past the third"]]
    # unigrams: red shoes red hat red shoes tie x -> {red, shoes, hat, tie, x} of 8
    assert metrics.distinct_n(responses, 1, K) == pytest.approx(5 / 8)
    # bigrams stay within a query: (red shoes) (red hat) (red shoes) -> 2 of 3
    assert metrics.distinct_n(responses, 2, K) == pytest.approx(2 / 3)
    assert metrics.distinct_n(responses, 3, K) is None
    assert metrics.distinct_n([], 1, K) is None


lines = st.lists(st.sampled_from(["red shoes", "Red shoes", "hat", "blue hat", "", "?"]), max_size=5)


@given(queries=lines, targets=lines, history=lines, data=st.data())
def test_measures_stay_in_range_and_agree_with_each_other(
    queries: list[str], targets: list[str], history: list[str], data: st.DataObject
) -> None:
    scores = data.draw(st.lists(st.integers(0, 2), min_size=len(queries), max_size=len(queries)))
    relevance = metrics.relevance_rate(scores, K)
    unique = metrics.unique_relevance_rate(queries, scores, K)
    assert 0 <= unique <= relevance <= 1
    recall = metrics.target_recall(queries, targets, K)
    f1 = metrics.best_match_f1(queries, targets, K)
    assert (recall is None) == (f1 is None)
    if recall is not None:
        assert 0 <= recall <= f1 + 1e-12 <= 1 + 2e-12  # a target that is hit has F1 of 1
    # New and repeated targets partition the distinct ones, so their recalls average to the whole.
    parts = metrics.new_and_repeated(targets, history)
    sizes = [len(metrics.distinct_forms(part)) for part in parts]
    hits = sum(size * (metrics.target_recall(queries, part, K) or 0.0) for size, part in zip(sizes, parts, strict=True))
    assert hits == pytest.approx((recall or 0.0) * sum(sizes))
