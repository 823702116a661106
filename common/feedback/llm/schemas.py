"""The form of an answer: what the endpoint is held to, and what is checked again once the answer is here.

One schema serves all records (an endpoint compiles a grammar for each), so what depends on the record - which queries,
how many words - is checked here. An answer that does not fit is an error with a text that a model can act on; it never
becomes a score.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from common.feedback.annotator import Annotation, mark_repeats, words_by_query
from common.feedback.llm.prompts import lines_with_words
from common.text import normalise

Form = TypeVar("Form", bound=BaseModel)

_FENCED = re.compile(r"\s*```(?:json)?\s*\n(.*)\n\s*```\s*", re.DOTALL)
_SHOWN_PROBLEMS = 5


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


class WordScore(_Strict):
    """The score of one word by its number."""

    i: int
    score: Score


class QueryScores(_Strict):
    """The words of one query, then the query."""

    query: int
    words: list[WordScore]
    score: Score


class ResponseScores(_Strict):
    """Answer to label_words and label_terse."""

    queries: list[QueryScores]


class QueryScore(_Strict):
    """The score of one whole query."""

    query: int
    score: Score


class SentenceScores(_Strict):
    """Answer to judge_sentence."""

    queries: list[QueryScore]


class Verdict(_Strict):
    """Answer to compare_sentence."""

    verdict: Literal["A", "B", "tie"]


class ScoredVerdict(_Strict):
    """Answer to compare_words."""

    a: list[QueryScores]
    b: list[QueryScores]
    verdict: Literal["A", "B", "tie"]


@cache  # the same for every record, and slow to make
def response_format(form: type[BaseModel]) -> dict[str, Any]:
    """The `response_format` that holds an endpoint to `form` (OpenAI's structured outputs; vLLM and others take it)."""
    return {
        "type": "json_schema",
        "json_schema": {"name": form.__name__, "strict": True, "schema": form.model_json_schema()},
    }


def parse(text: str, form: type[Form]) -> Form:
    """`text` as a `form`; raises `AnswerError`. A Markdown fence around the JSON is no part of it."""
    fenced = _FENCED.fullmatch(text)
    try:
        return form.model_validate_json(fenced.group(1) if fenced else text)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, problem['loc'])) or 'the answer'}: {problem['msg']}"
            for problem in error.errors(include_url=False, include_input=False)
        ]
        more = f"; and {len(problems) - _SHOWN_PROBLEMS} more" if len(problems) > _SHOWN_PROBLEMS else ""
        raise AnswerError("; ".join(problems[:_SHOWN_PROBLEMS]) + more) from None


def parse_annotation(text: str, response: str) -> Annotation:
    """The scores of `response` in an answer to label_words; raises `AnswerError`.

    A line without words was not asked about and scores 0, an empty line being no query. A word that its query said
    before scores 0, as with every annotator.
    """
    return check_scores(parse(text, ResponseScores).queries, response)


def parse_query_scores(text: str, response: str) -> tuple[int, ...]:
    """A score for each line of `response` in an answer to judge_sentence; raises `AnswerError`."""
    queries = parse(text, SentenceScores).queries
    asked = lines_with_words(response)
    _check_numbers([query.query for query in queries], len(asked), "query", "")
    scores = [0] * len(words_by_query(response))
    for query in queries:
        scores[asked[query.query - 1]] = query.score
    return tuple(scores)


def check_scores(queries: Sequence[QueryScores], response: str) -> Annotation:
    """The scores as an annotation of `response`; raises `AnswerError` unless each query and word is scored once."""
    asked = lines_with_words(response)
    words = words_by_query(response)
    _check_numbers([query.query for query in queries], len(asked), "query", "")
    word_scores = [[0] * len(line) for line in words]
    query_scores = [0] * len(words)
    for query in queries:
        line = asked[query.query - 1]
        _check_numbers([word.i for word in query.words], len(words[line]), "word", f" of query {query.query}")
        for word in query.words:
            word_scores[line][word.i - 1] = word.score
        if query.score == 2 and not any(word_scores[line]):
            raise AnswerError(f"query {query.query} scores 2 while all its words score 0")
        query_scores[line] = query.score
        for place, repeated in enumerate(mark_repeats([normalise(word.text) for word in words[line]])):
            if repeated:
                word_scores[line][place] = 0
    return Annotation(tuple(map(tuple, word_scores)), tuple(query_scores))


def _check_numbers(numbers: Sequence[int], count: int, what: str, where: str) -> None:
    """Raise `AnswerError` unless `numbers` are 1 to `count` in any order."""
    if len(set(numbers)) < len(numbers):
        twice = sorted({number for number in numbers if numbers.count(number) > 1})
        raise AnswerError(f"{what} {_listed(twice)}{where} is scored more than once")
    if missing := sorted(set(range(1, count + 1)) - set(numbers)):
        raise AnswerError(f"{what} {_listed(missing)}{where} has no score; there are {count}")
    if extra := sorted(set(numbers) - set(range(1, count + 1))):
        raise AnswerError(f"there is no {what} {_listed(extra)}{where}; there are {count}")


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:_SHOWN_PROBLEMS])) + (", ..." if len(numbers) > _SHOWN_PROBLEMS else "")
