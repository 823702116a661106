"""The annotator of the embedded log: it knows the simulator's truth and errs at a set rate."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from common.errors import InputError
from common.feedback.annotator import (
    SCORES,
    Annotation,
    FeedbackItem,
    content_scores,
    mark_repeats,
    normalised_words,
)
from common.files import digest, read_jsonl
from common.text import STOP_WORDS, split_queries

_WRONG_QUERY_SCORE = {0: 2, 1: 0, 2: 0}


class SimulatedAnnotator:
    """Scores by the latent truth (`truth.jsonl`, see common/data/simulator.py).

    A word scores what the truth says for the user, 0 when it says nothing; a stop word 1; a word that its query said
    before 0. For a query's score see `query_score`. With `word_error_rate` e, each word's score is replaced with
    probability e by one of the two others; each query's score is computed from the true word scores and then, with
    probability e, made wrong (2 becomes 0, 1 becomes 0, 0 becomes 2). The errors depend on nothing but the seed, the
    example, the response and the place in it.

    Raises `InputError` for a missing or malformed truth file, a rate outside 0..1, and a user that the truth lacks.
    """

    def __init__(self, truth_path: str | Path, *, word_error_rate: float = 0.0, seed: int = 0) -> None:
        if not 0 <= word_error_rate <= 1:
            raise InputError(f"--word_error_rate must lie between 0 and 1, found {word_error_rate}")
        self.name = "simulated"
        if word_error_rate:
            self.name += f":word_error_rate={word_error_rate},seed={seed}"
        self._path = Path(truth_path)
        self._truth = read_truth(truth_path)
        self._error_rate = word_error_rate
        self._seed = seed

    def annotate(self, item: FeedbackItem) -> Annotation:
        """Scores of `item.response` for `item.user_id`."""
        truth = self._truth.get(item.user_id)
        if truth is None:
            raise InputError(
                f"{self._path}: no truth for user {item.user_id!r}; give the truth.jsonl that was written with this log"
            )
        lines = [normalised_words(line) for line in split_queries(item.response)]
        word_scores = [score_words(line, truth) for line in lines]
        query_scores = [query_score(line, scores) for line, scores in zip(lines, word_scores, strict=True)]
        if self._error_rate:
            rng = random.Random(digest(str(self._seed), item.example_id, item.response))
            word_scores = [[self._misread(score, rng) for score in scores] for scores in word_scores]
            query_scores = [
                _WRONG_QUERY_SCORE[score] if rng.random() < self._error_rate else score for score in query_scores
            ]
        return Annotation(tuple(map(tuple, word_scores)), tuple(query_scores))

    def _misread(self, score: int, rng: random.Random) -> int:
        if rng.random() >= self._error_rate:
            return score
        return rng.choice([other for other in SCORES if other != score])


def score_words(words: Sequence[str], truth: dict[str, int]) -> list[int]:
    """True scores of one query's words (normalised); `truth` maps a user's relevant words to 1 or 2."""
    return [
        0 if repeated else 1 if word in STOP_WORDS else truth.get(word, 0)
        for word, repeated in zip(words, mark_repeats(words), strict=True)
    ]


def query_score(words: Sequence[str], scores: Sequence[int]) -> int:
    """True score of a query from its content words, the words that are no stop words.

    0 when there are none, when one of them scores 0 (it is foreign or repeated), or when none scores 2; otherwise 2
    when at least half of them score 2, else 1.
    """
    content = content_scores(words, scores)
    if 0 in content or 2 not in content:
        return 0
    return 2 if 2 * content.count(2) >= len(content) else 1


def read_truth(path: str | Path) -> dict[str, dict[str, int]]:
    """Each user's words that score 1 or 2; raises `InputError` with file and line for a file that is no truth."""
    truth: dict[str, dict[str, int]] = {}
    for number, row in read_jsonl(path):
        user, words = row.get("user_id"), row.get("words")
        if not isinstance(user, str) or not isinstance(words, dict):
            raise InputError(f"{path}:{number}: expected 'user_id' and 'words', the truth that the simulator wrote")
        if any(type(score) is not int or score not in (1, 2) for score in words.values()):
            raise InputError(f"{path}:{number}: a word's score must be 1 or 2")
        if user in truth:
            raise InputError(f"{path}:{number}: user {user!r} occurs twice")
        truth[user] = words
    if not truth:
        raise InputError(f"{path}: no users in the truth file")
    return truth
