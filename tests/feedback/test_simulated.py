"""The simulated annotator against hand tables, and its errors against the binomial law."""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path

import pytest

from common.errors import InputError
from common.feedback.annotator import FeedbackItem, words_by_query
from common.feedback.simulated import SimulatedAnnotator, read_truth

TRUTH = '{"user_id": "u", "interests": ["coffee"], "words": {"espresso": 2, "ceramic": 2, "latte": 1, "price": 1, '
TRUTH += '"茶": 2, "价": 1}}\n'

# Query, scores of its words, score of the query.
TABLE = [
    ("ceramic espresso price", [2, 2, 1], 2),
    ("espresso price", [2, 1], 2),
    ("espresso latte price", [2, 1, 1], 1),
    ("latte price", [1, 1], 0),
    ("espresso router", [2, 0], 0),
    ("ceramic espresso latte price router", [2, 2, 1, 1, 0], 0),
    ("how to price espresso", [1, 1, 1, 2], 2),
    ("what is the", [1, 1, 1], 0),
    ("espresso espresso", [2, 0], 0),
    ("Espresso, ESPRESSO! price", [2, 0, 1], 0),
    ("how to how espresso", [1, 1, 0, 2], 2),
    ("router and router", [0, 1, 0], 0),
    ('"Espresso" (ceramic)!', [2, 2], 2),
    ("ＥＳＰＲＥＳＳＯ", [2], 2),
    ("espressos", [0], 0),
    ("espresso-price", [0], 0),
    ("", [], 0),
    ("?!", [], 0),
    ("茶价", [2, 1], 2),
    ("茶 价格", [2, 1, 0], 0),
    ("茶茶", [2, 0], 0),
]


@pytest.fixture
def truth(tmp_path: Path) -> Path:
    path = tmp_path / "truth.jsonl"
    path.write_text(TRUTH, encoding="utf-8")
    return path


def item(response: str, example: str = "u-0", user: str = "u") -> FeedbackItem:
    return FeedbackItem(example, user, (), (), response)


def test_hand_table_as_one_response(truth: Path) -> None:
    response = "\n".join(query for query, _, _ in TABLE) + "\n"
    annotation = SimulatedAnnotator(truth).annotate(item(response))
    scored = zip(TABLE, annotation.word_scores, annotation.query_scores, strict=True)
    assert [(query, list(words), score) for (query, _, _), words, score in scored] == TABLE


def test_empty_response_and_empty_line(truth: Path) -> None:
    annotator = SimulatedAnnotator(truth)
    assert annotator.annotate(item("")).query_scores == ()
    annotation = annotator.annotate(item("\nespresso\n"))
    assert annotation.word_scores == ((), (2,)) and annotation.query_scores == (0, 2)


def test_unknown_user_is_named(truth: Path) -> None:
    with pytest.raises(InputError, match=re.escape("truth.jsonl: no truth for user 'stranger'")):
        SimulatedAnnotator(truth).annotate(item("espresso", user="stranger"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"user_id": "v"}', "truth.jsonl:2: expected 'user_id' and 'words'"),
        ('{"user_id": "v", "words": {"tea": 3}}', "truth.jsonl:2: a word's score must be 1 or 2"),
        ('{"user_id": "v", "words": {"tea": true}}', "truth.jsonl:2: a word's score must be 1 or 2"),
        ('{"user_id": "u", "words": {"tea": 2}}', "truth.jsonl:2: user 'u' occurs twice"),
    ],
)
def test_malformed_truth_is_refused(truth: Path, line: str, message: str) -> None:
    with truth.open("a") as stream:
        stream.write(line + "\n")
    with pytest.raises(InputError, match=re.escape(message)):
        read_truth(truth)


def test_empty_truth_is_refused(tmp_path: Path) -> None:
    (tmp_path / "truth.jsonl").write_text("")
    with pytest.raises(InputError, match="no users"):
        read_truth(tmp_path / "truth.jsonl")


def assert_share(count: int, trials: int, share: float) -> None:
    """A binomial count lies within four standard deviations."""
    assert abs(count / trials - share) <= 4 * math.sqrt(share * (1 - share) / trials), (count / trials, share)


def test_word_errors_have_the_set_share_and_go_both_ways(truth: Path) -> None:
    """Each wrong word label is either of the two others with chance a half; a wrong query is 2 for 0, else 0."""
    rate = 0.09
    exact, erring = SimulatedAnnotator(truth), SimulatedAnnotator(truth, word_error_rate=rate, seed=1)
    response = "\n".join(query for query, _, _ in TABLE)
    words: Counter[tuple[int, int]] = Counter()
    queries: Counter[tuple[int, int]] = Counter()
    for number in range(400):
        right = exact.annotate(item(response, f"u-{number}"))
        given = erring.annotate(item(response, f"u-{number}"))
        for true_line, line in zip(right.word_scores, given.word_scores, strict=True):
            words.update(zip(true_line, line, strict=True))
        queries.update(zip(right.query_scores, given.query_scores, strict=True))
    for true_score in (0, 1, 2):
        others = [words[true_score, score] for score in (0, 1, 2) if score != true_score]
        assert_share(sum(others), sum(others) + words[true_score, true_score], rate)
        assert_share(others[0], sum(others), 0.5)
    wrong = {0: 2, 1: 0, 2: 0}
    for true_score, flipped in wrong.items():
        total = queries[true_score, true_score] + queries[true_score, flipped]
        assert total == sum(count for (score, _), count in queries.items() if score == true_score)
        assert_share(queries[true_score, flipped], total, rate)


def test_each_place_errs_at_the_same_rate(truth: Path) -> None:
    erring = SimulatedAnnotator(truth, word_error_rate=0.5)
    response = "espresso latte\nprice router"
    right = [2, 1, 1, 0]
    wrong = [0] * 4
    for number in range(2000):
        lines = erring.annotate(item(response, str(number))).word_scores
        for place, score in enumerate(score for line in lines for score in line):
            wrong[place] += score != right[place]
    for count in wrong:
        assert_share(count, 2000, 0.5)


def test_errors_repeat_and_depend_on_seed_example_and_response(truth: Path) -> None:
    def annotate(seed: int, example: str, end: str = "") -> tuple:
        response = "\n".join(["espresso latte router price"] * 20) + end
        annotation = SimulatedAnnotator(truth, word_error_rate=0.3, seed=seed).annotate(item(response, example))
        return annotation.word_scores[:20], annotation.query_scores[:20]

    assert annotate(0, "a") == annotate(0, "a")
    assert len({annotate(0, "a"), annotate(1, "a"), annotate(0, "b"), annotate(0, "a", "\nlatte")}) == 4


def test_rates_0_and_1_leave_all_and_none_right(truth: Path) -> None:
    response = "\n".join(query for query, _, _ in TABLE)
    right = SimulatedAnnotator(truth).annotate(item(response))
    assert SimulatedAnnotator(truth, word_error_rate=0.0, seed=5).annotate(item(response)) == right
    wrong = SimulatedAnnotator(truth, word_error_rate=1.0).annotate(item(response))
    for line, words in enumerate(words_by_query(response)):
        assert all(right.word_scores[line][j] != wrong.word_scores[line][j] for j in range(len(words)))
    assert [right.query_scores.count(score) for score in (0, 1, 2)] == [13, 1, 7]
    assert wrong.query_scores.count(2) == 13 and wrong.query_scores.count(0) == 8
