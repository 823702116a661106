"""Who scores words and queries: what an annotator gets, what it gives back, and what makes an answer valid.

Scores are 0 irrelevant, 1 relevant, 2 very relevant (docs/method.md, section 2). A query counts as relevant when its
sentence score is at least `RELEVANT_FROM`. In every annotator a word that its query said before scores 0, as noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from tqdm import tqdm

from common.data.records import Event, Example
from common.text import STOP_WORDS, Word, normalise, split_queries, split_words

SCORES = (0, 1, 2)
RELEVANT_FROM = 1


@dataclass(frozen=True, slots=True)
class FeedbackItem:
    """A response to be scored, and what is known of the user. `targets` are the logged next queries."""

    example_id: str
    user_id: str
    history: tuple[Event, ...]
    targets: tuple[str, ...]
    response: str

    @classmethod
    def of(cls, example: Example, response: str) -> FeedbackItem:
        """What an annotator gets to see of a response to `example`."""
        return cls(example.id, example.user_id, example.history, example.targets, response)


@dataclass(frozen=True, slots=True)
class Annotation:
    """`word_scores[q][j]` belongs to word j of line q, `query_scores[q]` to line q (see `words_by_query`)."""

    word_scores: tuple[tuple[int, ...], ...]
    query_scores: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Unlabelled:
    """Why a response has no annotation, and what the annotator said instead. It is never a score of 0."""

    reason: str
    replies: tuple[str, ...] = ()


# Receives each result once, with the place of its item.
Done = Callable[[int, Annotation | Unlabelled], None]


class Annotator(Protocol):
    """Scores one response after another. `name` tells it apart from every annotator that would score otherwise."""

    name: str

    def annotate(self, item: FeedbackItem) -> Annotation:
        """The scores of `item.response`; they fit it as `check_annotation` demands."""
        ...


@runtime_checkable
class BatchAnnotator(Protocol):
    """Scores many responses at a time, and may fail on some."""

    name: str

    def annotate_all(
        self, items: Sequence[FeedbackItem], done: Done, progress: str, before: int = 0
    ) -> None:
        """Call `done(place, annotation)` once for each item, in any order.

        `progress` names the progress bar, and `before` counts items that were annotated in an earlier run.
        """
        ...


def annotate_all(
    annotator: Annotator | BatchAnnotator,
    items: Sequence[FeedbackItem],
    done: Done,
    progress: str,
    before: int = 0,
) -> None:
    """`BatchAnnotator.annotate_all`, for either kind of annotator; one that computes shows no bar without a name."""
    if isinstance(annotator, BatchAnnotator):
        annotator.annotate_all(items, done, progress, before)
        return
    bar = tqdm(
        items, desc=progress, unit="record", initial=before, total=before + len(items), disable=not progress
    )
    for place, item in enumerate(bar):
        done(place, annotator.annotate(item))


def words_by_query(response: str) -> list[list[Word]]:
    """The words of each line of `split_queries(response)`, in order; an empty line has none."""
    lines: list[list[Word]] = [[] for _ in split_queries(response)]
    for word in split_words(response):
        lines[word.line].append(word)
    return lines


def normalised_words(text: str) -> list[str]:
    """The words of `text` in order, each in the form in which words are compared."""
    return [normalise(word.text) for word in split_words(text)]


def mark_repeats(words: Sequence[str]) -> list[bool]:
    """For each word of a query, whether the query said it before; `words` are normalised."""
    return [word in words[:place] for place, word in enumerate(words)]


def content_scores(words: Sequence[str], scores: Sequence[int]) -> list[int]:
    """The scores of the words that are no stop words; `words` are normalised."""
    return [score for word, score in zip(words, scores, strict=True) if word not in STOP_WORDS]


def check_annotation(annotation: Annotation, response: str) -> None:
    """Raise `ValueError` unless there is one score for each word and line of `response`, each 0, 1 or 2."""
    expected = [len(words) for words in words_by_query(response)]
    if len(annotation.query_scores) != len(expected) or len(annotation.word_scores) != len(expected):
        raise ValueError(
            f"{len(annotation.word_scores)} lines of word scores and {len(annotation.query_scores)} query scores "
            f"for {len(expected)} lines"
        )
    for line, (scores, count) in enumerate(zip(annotation.word_scores, expected, strict=True), start=1):
        if len(scores) != count:
            raise ValueError(f"{len(scores)} word scores for the {count} words of line {line}")
    for score in (*annotation.query_scores, *(score for scores in annotation.word_scores for score in scores)):
        if type(score) is not int or score not in SCORES:  # a JSON true equals 1 and is none
            raise ValueError(f"score {score!r} is none of 0, 1, 2")
