"""The form of an answer: what the endpoint is held to, and what is checked again once the answer is here.

A form is made for each record: an object with a place for every query and every word that was asked about, by its
number. An endpoint that is held to it can leave none out, and invent none. Only objects and enumerations are used,
which every endpoint's structured output knows. An answer that does not fit is an error with a text that a model can act
on; it never becomes a score.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import cache, lru_cache
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, create_model

from common.errors import one_line
from common.feedback.annotator import Annotation, mark_repeats, words_by_query
from common.feedback.llm.prompts import lines_with_words
from common.text import normalise

Form = type[BaseModel]

_FENCED = re.compile(r"\s*```(?:json)?\s*\n(.*)\n\s*```\s*", re.DOTALL)
_SHOWN_PROBLEMS = 5
_KEPT_FORMS = 1024


class AnswerError(ValueError):
    """An answer that does not fit; the message says what is wrong, for the model that gave it."""


def _whole_number(value: Any) -> Any:
    """Python's `True == 1 == 1.0` must not make a score of what is none."""
    if type(value) is not int:
        raise ValueError("must be a whole number")
    return value


Score = Annotated[Literal[0, 1, 2], BeforeValidator(_whole_number)]


def _without_description(schema: dict[str, Any]) -> None:
    """A docstring is for readers of the code; in the schema it would be a part of every request and key."""
    schema.pop("description", None)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra=_without_description)


class Verdict(_Strict):
    """Answer to compare_sentence."""

    verdict: Literal["A", "B", "tie"]


def word_form(response: str) -> Form:
    """Answer to label_words and label_terse about `response`."""
    return _word_form(_asked_words(response))


def query_form(response: str) -> Form:
    """Answer to judge_sentence about `response`."""
    return _query_form(len(_asked_words(response)))


def scored_verdict_form(a: str, b: str) -> Form:
    """Answer to compare_words about two responses."""
    return _scored_verdict_form(_asked_words(a), _asked_words(b))


# Making a form takes milliseconds, and many records have the same numbers of words.
@lru_cache(_KEPT_FORMS)
def _word_form(words: tuple[int, ...]) -> Form:
    return _form("ResponseScores", queries=_numbered("Queries", map(_word_scores, words)))


@cache
def _query_form(queries: int) -> Form:
    return _form("SentenceScores", queries=_numbered("Queries", [Score] * queries))


@lru_cache(_KEPT_FORMS)
def _scored_verdict_form(a: tuple[int, ...], b: tuple[int, ...]) -> Form:
    lists = {"a": _numbered("ListA", map(_word_scores, a)), "b": _numbered("ListB", map(_word_scores, b))}
    return _form("ScoredVerdict", **lists, verdict=Literal["A", "B", "tie"])


@cache
def _word_scores(count: int) -> Form:
    """The scores of a query's words, then the query's."""
    return _form(f"Query{count}", words=_numbered(f"Words{count}", [Score] * count), score=Score)


def _numbered(name: str, kinds: Iterable[Any]) -> Form:
    """One value for each number from 1 on."""
    return _form(name, **{str(number): kind for number, kind in enumerate(kinds, start=1)})


def _form(name: str, **kinds: Any) -> Form:
    """An object with exactly these values, in this order."""
    return create_model(name, __base__=_Strict, **{field: (kind, ...) for field, kind in kinds.items()})


def _asked_words(response: str) -> tuple[int, ...]:
    """The number of words of each line that is asked about."""
    words = words_by_query(response)
    return tuple(len(words[line]) for line in lines_with_words(response))


@lru_cache(_KEPT_FORMS)
def response_format(form: Form, way: str) -> dict[str, Any] | None:
    """The `response_format` that holds an endpoint to `form` in one of `options.WAYS`; None for `none`.

    `json_schema` is OpenAI's structured output (vLLM and others take it), `json_object` with a schema is llama.cpp's.
    """
    if way == "none":
        return None
    schema = form.model_json_schema()
    if way == "json_object":
        return {"type": "json_object", "schema": schema}
    return {"type": "json_schema", "json_schema": {"name": form.__name__, "strict": True, "schema": schema}}


def parse(text: str, form: Form) -> dict[str, Any]:
    """`text` as a `form`; raises `AnswerError`. A Markdown fence around the JSON is no part of it."""
    fenced = _FENCED.fullmatch(text)
    try:
        value = json.loads(fenced.group(1) if fenced else text, object_pairs_hook=_without_repeats)
        return form.model_validate(value).model_dump()
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, problem['loc'])) or 'the answer'}: {problem['msg']}"
            for problem in error.errors(include_url=False, include_input=False)
        ]
        more = f"; and {len(problems) - _SHOWN_PROBLEMS} more" if len(problems) > _SHOWN_PROBLEMS else ""
        raise AnswerError("; ".join(problems[:_SHOWN_PROBLEMS]) + more) from None
    except AnswerError:
        raise
    except (ValueError, RecursionError) as error:
        raise AnswerError(f"not valid JSON ({one_line(error)})") from None


def fits(text: str, form: Form) -> bool:
    """Whether `text` has the form; what it means is not looked at."""
    try:
        parse(text, form)
    except AnswerError:
        return False
    return True


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; raises `AnswerError` for a name that occurs twice, of which Python would keep the last value."""
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise AnswerError(f"{one_line(repr(twice), 80)} occurs more than once in one object")
    return value


def parse_annotation(text: str, response: str) -> Annotation:
    """The scores of `response` in an answer to label_words; raises `AnswerError`.

    A line without words was not asked about and scores 0, an empty line being no query. A word that its query said
    before scores 0, as with every annotator.
    """
    return check_scores(parse(text, word_form(response))["queries"], response)


def parse_query_scores(text: str, response: str) -> tuple[int, ...]:
    """A score for each line of `response` in an answer to judge_sentence; raises `AnswerError`."""
    queries = parse(text, query_form(response))["queries"]
    scores = [0] * len(words_by_query(response))
    for line, score in zip(lines_with_words(response), queries.values(), strict=True):
        scores[line] = score
    return tuple(scores)


def check_scores(queries: Mapping[str, Mapping[str, Any]], response: str) -> Annotation:
    """The scores of a `word_form` as an annotation of `response`; raises `AnswerError` where they contradict."""
    words = words_by_query(response)
    word_scores = [[0] * len(line) for line in words]
    query_scores = [0] * len(words)
    for line, (number, query) in zip(lines_with_words(response), queries.items(), strict=True):
        if query["score"] == 2 and not any(query["words"].values()):
            raise AnswerError(f"query {number} scores 2 while all its words score 0")
        query_scores[line] = query["score"]
        repeats = mark_repeats([normalise(word.text) for word in words[line]])
        word_scores[line] = [
            0 if repeated else score for repeated, score in zip(repeats, query["words"].values(), strict=True)
        ]
    return Annotation(tuple(map(tuple, word_scores)), tuple(query_scores))
