"""What every annotator shares: which words belong to which line, repeats, and what makes an annotation valid."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.data.records import Event
from common.errors import InputError
from common.feedback.annotator import (
    Annotation,
    FeedbackItem,
    check_annotation,
    mark_repeats,
    normalised_words,
    words_by_query,
)
from common.feedback.lexical import LexicalAnnotator
from common.feedback.load import load_annotator
from common.feedback.simulated import SimulatedAnnotator
from common.text import split_queries

RESPONSES = st.text(st.sampled_from("aA bé-.,\n\r\t茶ア・\u3000\u2028!'ßİ½"), max_size=40)


def item(response: str) -> FeedbackItem:
    return FeedbackItem("e", "u", (Event("search", query="a bé 茶"),), ("aa b",), response)


def test_words_by_query_of_every_kind_of_line() -> None:
    response = "  cheap, (flights)\n\n...\n茶の 店\n"
    assert [[word.text for word in words] for words in words_by_query(response)] == [
        ["cheap", "flights"],
        [],
        [],
        ["茶", "の", "店"],
    ]
    assert words_by_query("") == [] and words_by_query("\n") == [[]]


@given(RESPONSES)
def test_every_annotator_fits_every_response(response: str) -> None:
    annotation = LexicalAnnotator().annotate(item(response))
    check_annotation(annotation, response)
    assert len(annotation.query_scores) == len(split_queries(response))
    for line, score in zip(words_by_query(response), annotation.query_scores, strict=True):
        assert line or score == 0


@given(RESPONSES)
def test_words_of_a_line_are_the_words_of_the_response(response: str) -> None:
    lines = [normalised_words(line) for line in split_queries(response)]
    expected = [[normalised_words(word.text) for word in words] for words in words_by_query(response)]
    assert [len(line) for line in lines] == [len(words) for words in expected]


def test_a_repeat_is_each_mention_after_the_first() -> None:
    words = normalised_words("Tea, green TEA tea! and green-tea")
    assert words == ["tea", "green", "tea", "tea", "and", "green-tea"]
    assert mark_repeats(words) == [False, False, True, True, False, False]


@pytest.mark.parametrize(
    ("words", "queries", "message"),
    [
        (((1, 2),), (1,), "1 lines of word scores and 1 query scores for 2 lines"),
        (((1, 2), (0,)), (1,), "2 lines of word scores and 1 query scores for 2 lines"),
        (((1,), (0,)), (1, 1), "1 word scores for the 2 words of line 1"),
        (((1, 2), (0, 0)), (1, 1), "2 word scores for the 1 words of line 2"),
        (((1, 3), (0,)), (1, 1), "score 3 is none of 0, 1, 2"),
        (((1, 2), (0,)), (1, -1), "score -1 is none of 0, 1, 2"),
        (((1, True), (0,)), (1, 1), "score True is none of 0, 1, 2"),
        (((1, 1.0), (0,)), (1, 1), "score 1.0 is none of 0, 1, 2"),
    ],
)
def test_annotation_that_does_not_fit_is_refused(
    words: tuple[tuple[int, ...], ...], queries: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check_annotation(Annotation(words, queries), "green tea\nshop\n")


def test_annotation_that_fits_passes() -> None:
    check_annotation(Annotation(((1, 2), (0,)), (2, 0)), "green tea\nshop\n")
    check_annotation(Annotation((), ()), "")


def test_load_annotator(tmp_path: Path) -> None:
    truth = tmp_path / "truth.jsonl"
    truth.write_text('{"user_id": "u", "interests": [], "words": {"tea": 2}}\n')
    assert isinstance(load_annotator("lexical"), LexicalAnnotator)
    exact = load_annotator("simulated", truth_path=str(truth))
    erring = load_annotator("simulated", truth_path=str(truth), word_error_rate=0.09, seed=4)
    assert isinstance(exact, SimulatedAnnotator) and exact.name == "simulated"
    assert erring.name == "simulated:word_error_rate=0.09,seed=4"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("oracle", {}, "annotator 'oracle' is none of simulated, lexical"),
        ("simulated", {}, "give --truth"),
        ("simulated", {"truth_path": "missing.jsonl"}, "missing.jsonl: no such file"),
        ("simulated", {"truth_path": "missing.jsonl", "word_error_rate": 1.5}, "--word_error_rate must lie between"),
        ("lexical", {"truth_path": "truth.jsonl"}, "takes neither --truth"),
        ("lexical", {"word_error_rate": 0.1}, "nor --word_error_rate"),
    ],
)
def test_load_annotator_refuses(name: str, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        load_annotator(name, **options)
