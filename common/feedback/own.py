"""An annotator of one's own: a Python function that scores the words of a response.

    --annotator my_scores.py:score

    def score(history, response):       # my_scores.py
        seen = {word for event in history for word in event.text.lower().split()}
        return [[2 if word.lower() in seen else 0 for word in query] for query in response]

`history` is the user's events (`common.data.records.Event`: type, text, query, title, url, ts, rank), the newest
last; `response` is a list of queries, each a list of its words as this project splits them (`common.text.split_words`).
The answer is a list of the same form that holds 0 (irrelevant), 1 (relevant) or 2 (very relevant) in the place of each
word.

The file is run as it stands, with your rights, on every rank, and only when it is asked for: give only a file that you
trust. The function sees neither the logged next queries nor who the user is. The same history and response must get
the same scores.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from common.data.records import Event
from common.errors import InputError, one_line
from common.feedback.annotator import SCORES, Annotation, FeedbackItem, mark_repeats, words_by_query
from common.feedback.lexical import query_score
from common.text import normalise

WordScores = Callable[[Sequence[Event], list[list[str]]], Sequence[Sequence[int]]]


class OwnAnnotator:
    """Scores words by a user's function; `name` is `own:<file>:<function>@<hash of the file>`.

    A word that its query said before scores 0, whatever the function says, as with every annotator. A query's score
    follows from those of its words (`lexical.query_score`).
    """

    def __init__(self, place: str) -> None:
        """`place` is `FILE.py:FUNCTION`; raises `InputError` if that is no function of two arguments."""
        self._place = place
        file, _, function = place.rpartition(":")
        self._path = Path(file)
        if not self._path.is_file():
            raise InputError(f"annotator {place!r}: no such file {file!r}; the form is FILE.py:FUNCTION")
        self.name = f"own:{self._path.name}:{function}@{hashlib.sha256(self._path.read_bytes()).hexdigest()[:12]}"
        self._function = _find_function(_run_file(self._path, place), function, place)

    def annotate(self, item: FeedbackItem) -> Annotation:
        """Scores of `item.response`; raises `InputError` if the function fails or its answer does not fit."""
        words = [[word.text for word in line] for line in words_by_query(item.response)]
        try:
            answer = self._function(item.history, [list(line) for line in words])
        except Exception as error:
            raise InputError(
                f"annotator {self._place!r} failed on example {item.example_id!r}: {_what_and_where(error, self._path)}"
            ) from error
        if (problem := find_problem(answer, words)) is not None:
            raise InputError(
                f"annotator {self._place!r} on example {item.example_id!r}: expected a list for each query that "
                f"holds 0, 1 or 2 for each of its words, {[len(line) for line in words]} of them, but {problem}; "
                f"the queries are {one_line(repr(words))}"
            )
        lines = [[normalise(word) for word in line] for line in words]
        word_scores = [
            [0 if repeated else int(score) for score, repeated in zip(scores, mark_repeats(line), strict=True)]
            for scores, line in zip(answer, lines, strict=True)
        ]
        query_scores = (query_score(line, scores) for line, scores in zip(lines, word_scores, strict=True))
        return Annotation(tuple(map(tuple, word_scores)), tuple(query_scores))


def find_problem(answer: Any, words: Sequence[Sequence[str]]) -> str | None:
    """What is wrong with a function's answer to a response of these words; None if nothing is."""
    if not isinstance(answer, list | tuple):
        return f"{_shown(answer)} came, which is no list"
    if len(answer) != len(words):
        return f"a list of {len(answer)} came for {len(words)} queries"
    for number, (scores, line) in enumerate(zip(answer, words, strict=True), start=1):
        if not isinstance(scores, list | tuple):
            return f"{_shown(scores)} came for query {number}, which is no list"
        if len(scores) != len(line):
            return f"{len(scores)} scores came for the {len(line)} words of query {number}"
        for word, score in zip(line, scores, strict=True):
            if type(score) is not int or score not in SCORES:
                return f"{_shown(score)} came for the word {word!r} of query {number}"
    return None


def _run_file(path: Path, place: str) -> ModuleType:
    """The file, run as a module whose name meets no other's."""
    name = f"own_annotator_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InputError(f"annotator {place!r}: {path} is no Python file; the form is FILE.py:FUNCTION")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(f"annotator {place!r}: {path} cannot be run: {_what_and_where(error, path)}") from error
    return module


def _find_function(module: ModuleType, name: str, place: str) -> WordScores:
    function = getattr(module, name, None)
    if not callable(function):
        known = sorted(key for key, value in vars(module).items() if inspect.isfunction(value))
        raise InputError(f"annotator {place!r}: {module.__file__} has no function {name!r}; it has {', '.join(known)}")
    try:
        inspect.signature(function).bind([], [])
    except TypeError as error:
        raise InputError(
            f"annotator {place!r}: expected a function of two arguments, history and response, "
            f"found {name}{inspect.signature(function)} ({error})"
        ) from None
    return function


def _what_and_where(error: Exception, path: Path) -> str:
    """An error's type and text, and the last line of the user's file that it passed."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == path.resolve()]
    if isinstance(error, SyntaxError) and error.lineno is not None:
        lines.append(error.lineno)
    where = f" at {path}:{lines[-1]}" if lines else ""
    return f"{type(error).__name__}: {one_line(error)}{where}"


def _shown(value: Any) -> str:
    return one_line(f"{value!r} ({type(value).__name__})", 80)
