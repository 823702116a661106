"""Answers of a language model: what is accepted, and what each error says."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.feedback.annotator import check_annotation, mark_repeats, words_by_query
from common.feedback.llm import schemas
from common.feedback.llm.prompts import lines_with_words
from common.feedback.llm.schemas import AnswerError, parse, parse_annotation, parse_query_scores, response_format
from common.text import normalise
from tests.unicode_texts import texts

RESPONSE = "trail shoes\n\nred red hat"


def answer(first: list, second: list, scores: tuple = (2, 1)) -> dict:
    return {
        "queries": [
            {"query": number, "words": [{"i": i, "score": score} for i, score in words], "score": query}
            for number, words, query in ((1, first, scores[0]), (2, second, scores[1]))
        ]
    }


GOOD = answer([(1, 1), (2, 2)], [(1, 2), (2, 2), (3, 0)])


def test_scores_reach_their_words_and_lines() -> None:
    """The empty line was not asked about and scores 0; the second "red" is noise, whatever the model says."""
    annotation = parse_annotation(json.dumps(GOOD), RESPONSE)
    assert annotation.word_scores == ((1, 2), (), (2, 0, 0))
    assert annotation.query_scores == (2, 0, 1)


def test_order_and_a_markdown_fence_do_not_matter() -> None:
    shuffled = answer([(2, 2), (1, 1)], [(3, 0), (1, 2), (2, 2)])
    shuffled["queries"].reverse()
    fenced = f"\n```json\n{json.dumps(shuffled, indent=1)}\n```\n"
    assert parse_annotation(fenced, RESPONSE) == parse_annotation(json.dumps(GOOD), RESPONSE)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "EOF while parsing"),
        ("The scores are 1 and 2.", "Invalid JSON"),
        (json.dumps(GOOD)[:-2], "EOF while parsing"),
        (json.dumps(GOOD) + " Hope this helps!", "trailing characters"),
        ([GOOD], "Input should be an object"),
        ({}, "queries: Field required"),
        ({**GOOD, "note": "ok"}, "note: Extra inputs are not permitted"),
        ({"queries": GOOD["queries"][:1]}, "query 2 has no score; there are 2"),
        ({"queries": GOOD["queries"] * 2}, "query 1, 2 is scored more than once"),
        (answer([(1, 1)], [(1, 2), (2, 2), (3, 0)]), "word 2 of query 1 has no score; there are 2"),
        (answer([(1, 1), (2, 2), (3, 2)], [(1, 2), (2, 2), (3, 0)]), "there is no word 3 of query 1; there are 2"),
        (answer([(0, 1), (1, 2), (2, 2)], [(1, 2), (2, 2), (3, 0)]), "there is no word 0 of query 1; there are 2"),
        (answer([(1, 1), (1, 2)], [(1, 2), (2, 2), (3, 0)]), "word 1 of query 1 is scored more than once"),
        (answer([(1, 1), (2, 3)], [(1, 2), (2, 2), (3, 0)]), "queries.0.words.1.score: Input should be 0, 1 or 2"),
        (answer([(1, 1), (2, True)], [(1, 2), (2, 2), (3, 0)]), "score: Value error, must be a whole number"),
        (answer([(1, 1), (2, 1.0)], [(1, 2), (2, 2), (3, 0)]), "score: Value error, must be a whole number"),
        (answer([(1, 1), (2, "2")], [(1, 2), (2, 2), (3, 0)]), "score: Value error, must be a whole number"),
        (answer([(1, 1), (2, None)], [(1, 2), (2, 2), (3, 0)]), "score: Value error, must be a whole number"),
        (answer([("1", 1), (2, 2)], [(1, 2), (2, 2), (3, 0)]), "words.0.i: Input should be a valid integer"),
        (answer([(1, 0), (2, 0)], [(1, 2), (2, 2), (3, 0)]), "query 1 scores 2 while all its words score 0"),
    ],
)
def test_an_answer_that_does_not_fit_says_why(given: object, message: str) -> None:
    text = given if isinstance(given, str) else json.dumps(given)
    with pytest.raises(AnswerError, match=message):
        parse_annotation(text, RESPONSE)


def test_many_errors_are_cut_to_a_few() -> None:
    wrong = answer([(i, 9) for i in range(1, 9)], [])
    with pytest.raises(AnswerError, match=r"; and 3 more$"):
        parse_annotation(json.dumps(wrong), "a b c d e f g h")


@settings(max_examples=200, deadline=None)
@given(texts(), st.randoms(use_true_random=False))
def test_any_response_gets_back_the_scores_it_was_given(response: str, chance: random.Random) -> None:
    words = words_by_query(response)
    asked = lines_with_words(response)
    scores = {line: [chance.randrange(3) for _ in words[line]] for line in asked}
    queries = [
        {"query": number, "words": [{"i": i, "score": s} for i, s in enumerate(scores[line], 1)],
         "score": chance.randrange(3) if any(scores[line]) else chance.randrange(2)}
        for number, line in enumerate(asked, 1)
    ]  # fmt: skip
    wanted = {asked[query["query"] - 1]: query["score"] for query in queries}
    for query in queries:
        chance.shuffle(query["words"])
    chance.shuffle(queries)
    annotation = parse_annotation(json.dumps({"queries": queries}), response)
    check_annotation(annotation, response)
    for line, of_line in enumerate(words):
        repeats = mark_repeats([normalise(word.text) for word in of_line])
        given_scores = [0 if repeat else s for s, repeat in zip(scores.get(line, []), repeats, strict=True)]
        assert list(annotation.word_scores[line]) == given_scores
        assert annotation.query_scores[line] == wanted.get(line, 0)


def test_whole_queries() -> None:
    text = '{"queries": [{"query": 2, "score": 1}, {"query": 1, "score": 2}]}'
    assert parse_query_scores(text, RESPONSE) == (2, 0, 1)
    with pytest.raises(AnswerError, match="query 2 has no score"):
        parse_query_scores('{"queries": [{"query": 1, "score": 2}]}', RESPONSE)


@pytest.mark.parametrize(
    "form", [schemas.ResponseScores, schemas.SentenceScores, schemas.Verdict, schemas.ScoredVerdict]
)
def test_schemas_are_those_that_endpoints_take(form: type) -> None:
    """OpenAI's strict mode: every object closed, every field required; and no text that editing code would change."""
    schema = response_format(form)["json_schema"]
    assert schema["strict"] is True
    objects = [schema["schema"], *schema["schema"].get("$defs", {}).values()]
    for described in objects:
        assert described["additionalProperties"] is False
        assert set(described["required"]) == set(described["properties"])
        assert "description" not in described


def test_a_verdict_is_one_of_three() -> None:
    assert parse('{"verdict": "tie"}', schemas.Verdict).verdict == "tie"
    with pytest.raises(AnswerError, match="verdict: Input should be 'A', 'B' or 'tie'"):
        parse('{"verdict": "C"}', schemas.Verdict)
