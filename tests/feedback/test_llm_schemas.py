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


def answer(first: dict, second: dict, scores: tuple = (2, 1)) -> dict:
    return {"queries": {"1": {"words": first, "score": scores[0]}, "2": {"words": second, "score": scores[1]}}}


GOOD = answer({"1": 1, "2": 2}, {"1": 2, "2": 2, "3": 0})
SECOND = {"1": 2, "2": 2, "3": 0}


def test_scores_reach_their_words_and_lines() -> None:
    """The empty line was not asked about and scores 0; the second "red" is noise, whatever the model says."""
    annotation = parse_annotation(json.dumps(GOOD), RESPONSE)
    assert annotation.word_scores == ((1, 2), (), (2, 0, 0))
    assert annotation.query_scores == (2, 0, 1)


def test_order_and_a_markdown_fence_do_not_matter() -> None:
    shuffled = {"queries": dict(reversed(answer({"2": 2, "1": 1}, {"3": 0, "1": 2, "2": 2})["queries"].items()))}
    fenced = f"\n```json\n{json.dumps(shuffled, indent=1)}\n```\n"
    assert parse_annotation(fenced, RESPONSE) == parse_annotation(json.dumps(GOOD), RESPONSE)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "not valid JSON"),
        ("The scores are 1 and 2.", "not valid JSON"),
        (json.dumps(GOOD)[:-2], "not valid JSON"),
        (json.dumps(GOOD) + " Hope this helps!", "Extra data"),
        ("[" * 100_000, "not valid JSON"),
        ("1" * 5000, "not valid JSON"),
        ([GOOD], "Input should be a valid dictionary"),
        ({}, "queries: Field required"),
        ({**GOOD, "note": "ok"}, "note: Extra inputs are not permitted"),
        ({"queries": {"1": GOOD["queries"]["1"]}}, "queries.2: Field required"),
        ({"queries": {**GOOD["queries"], "3": GOOD["queries"]["1"]}}, "queries.3: Extra inputs are not permitted"),
        (json.dumps(GOOD).replace('"2": {"w', '"1": {"w'), "'1' occurs more than once in one object"),
        (answer({"1": 1}, SECOND), "queries.1.words.2: Field required"),
        (answer({"1": 1, "2": 2, "3": 2}, SECOND), "queries.1.words.3: Extra inputs are not permitted"),
        (answer({"0": 1, "1": 2, "2": 2}, SECOND), "queries.1.words.0: Extra inputs are not permitted"),
        (json.dumps(answer({"1": 1, "2": 2}, SECOND)).replace('"2": 2}', '"1": 2}'), "'1' occurs more than once"),
        (answer({"1": 1, "2": 3}, SECOND), "queries.1.words.2: Input should be 0, 1 or 2"),
        (answer({"1": 1, "2": True}, SECOND), "queries.1.words.2: Value error, must be a whole number"),
        (answer({"1": 1, "2": 1.0}, SECOND), "queries.1.words.2: Value error, must be a whole number"),
        (answer({"1": 1, "2": "2"}, SECOND), "queries.1.words.2: Value error, must be a whole number"),
        (answer({"1": 1, "2": None}, SECOND), "queries.1.words.2: Value error, must be a whole number"),
        (answer([1, 2], SECOND), "queries.1.words: Input should be a valid dictionary"),
        (answer({"1": 0, "2": 0}, SECOND), "query 1 scores 2 while all its words score 0"),
    ],
)
def test_an_answer_that_does_not_fit_says_why(given: object, message: str) -> None:
    text = given if isinstance(given, str) else json.dumps(given)
    with pytest.raises(AnswerError, match=message):
        parse_annotation(text, RESPONSE)


def test_many_errors_are_cut_to_a_few() -> None:
    wrong = {"queries": {"1": {"words": {str(i): 9 for i in range(1, 9)}, "score": 0}}}
    with pytest.raises(AnswerError, match=r"; and 3 more$"):
        parse_annotation(json.dumps(wrong), "a b c d e f g h")


def shuffled(value: dict, chance: random.Random) -> dict:
    return dict(chance.sample(list(value.items()), len(value)))


@settings(max_examples=200, deadline=None)
@given(texts(), st.randoms(use_true_random=False))
def test_any_response_gets_back_the_scores_it_was_given(response: str, chance: random.Random) -> None:
    words = words_by_query(response)
    asked = lines_with_words(response)
    scores = {line: [chance.randrange(3) for _ in words[line]] for line in asked}
    queries = {
        str(number): {
            "words": shuffled({str(i): score for i, score in enumerate(scores[line], 1)}, chance),
            "score": chance.randrange(3) if any(scores[line]) else chance.randrange(2),
        }
        for number, line in enumerate(asked, 1)
    }
    wanted = {line: queries[str(number)]["score"] for number, line in enumerate(asked, 1)}
    queries = shuffled(queries, chance)
    annotation = parse_annotation(json.dumps({"queries": queries}), response)
    check_annotation(annotation, response)
    for line, of_line in enumerate(words):
        repeats = mark_repeats([normalise(word.text) for word in of_line])
        given_scores = [0 if repeat else s for s, repeat in zip(scores.get(line, []), repeats, strict=True)]
        assert list(annotation.word_scores[line]) == given_scores
        assert annotation.query_scores[line] == wanted.get(line, 0)


def test_whole_queries() -> None:
    assert parse_query_scores('{"queries": {"2": 1, "1": 2}}', RESPONSE) == (2, 0, 1)
    with pytest.raises(AnswerError, match=r"queries\.2: Field required"):
        parse_query_scores('{"queries": {"1": 2}}', RESPONSE)


FORMS = [
    schemas.word_form(RESPONSE), schemas.query_form(RESPONSE), schemas.Verdict,
    schemas.scored_verdict_form(RESPONSE, "felt hat"),
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_schemas_are_those_that_endpoints_take(form: type) -> None:
    """OpenAI's strict mode: every object closed, every field required; and no text that editing code would change."""
    schema = response_format(form, "json_schema")["json_schema"]
    assert schema["strict"] is True
    objects = [schema["schema"], *schema["schema"].get("$defs", {}).values()]
    for described in objects:
        assert described["type"] == "object" and described["additionalProperties"] is False
        assert set(described["required"]) == set(described["properties"])
        assert "description" not in described
    assert response_format(form, "json_object") == {"type": "json_object", "schema": schema["schema"]}
    assert response_format(form, "none") is None


def test_a_schema_names_each_word_and_query_that_was_asked_about() -> None:
    """The same one for responses of as many words, whatever the words are: an endpoint compiles it once."""
    schema = response_format(schemas.word_form(RESPONSE), "json_object")["schema"]
    assert list(schema["$defs"]["Queries"]["properties"]) == ["1", "2"]
    assert list(schema["$defs"]["Words2"]["properties"]) == ["1", "2"]
    assert list(schema["$defs"]["Words3"]["properties"]) == ["1", "2", "3"]
    score = {**schema["$defs"]["Words3"]["properties"]["3"]}
    assert (score["type"], score["enum"]) == ("integer", [0, 1, 2])
    assert schemas.word_form("blue socks\nold felt hat") is schemas.word_form(RESPONSE)
    assert schemas.word_form("blue socks\nfelt hat") is not schemas.word_form(RESPONSE)


def test_a_verdict_is_one_of_three() -> None:
    assert parse('{"verdict": "tie"}', schemas.Verdict)["verdict"] == "tie"
    with pytest.raises(AnswerError, match="verdict: Input should be 'A', 'B' or 'tie'"):
        parse('{"verdict": "C"}', schemas.Verdict)
