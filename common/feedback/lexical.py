"""A deterministic annotator without a model: it compares words with the user's history and true next queries.

It stands for a judge who knows the future: the targets are the example's own logged next queries. So its labels may
train a reward model, which never sees the targets, but they are no judgement of a query that is good and was not
searched.
"""

from __future__ import annotations

from collections.abc import Sequence

from common.feedback.annotator import Annotation, FeedbackItem, content_scores, mark_repeats, normalised_words
from common.text import STOP_WORDS, split_queries


class LexicalAnnotator:
    """Scores by where a word occurs, compared in normalised form; see `score_words` and `query_score`."""

    name = "lexical"

    def annotate(self, item: FeedbackItem) -> Annotation:
        """Scores of `item.response`.

        The history's words are those of every event's text: a search's query, and for a click, purchase or visit its
        title or, where the log has none, the readable part of its URL.
        """
        future = {word for target in item.targets for word in normalised_words(target)}
        past = {word for event in item.history for word in normalised_words(event.text)}
        lines = [normalised_words(line) for line in split_queries(item.response)]
        word_scores = [score_words(line, future, past) for line in lines]
        query_scores = [query_score(line, scores) for line, scores in zip(lines, word_scores, strict=True)]
        return Annotation(tuple(map(tuple, word_scores)), tuple(query_scores))


def score_words(words: Sequence[str], future: set[str], past: set[str]) -> list[int]:
    """Scores of one query's words (all normalised).

    2 for a word of the next queries, 1 for a word of the history, else 0. A stop word scores 1 when it occurs in
    either, since it tells little; a word that the query said before scores 0.
    """
    return [
        0 if repeated else _score_word(word, future, past)
        for word, repeated in zip(words, mark_repeats(words), strict=True)
    ]


def query_score(words: Sequence[str], scores: Sequence[int]) -> int:
    """Score of a query from its content words, the words that are no stop words; 0 when there are none.

    2 when none of them scores 0 and at least half score 2. 1 when none scores 0, or when at least half score 1 or 2
    and one scores 2. Otherwise 0.
    """
    content = content_scores(words, scores)
    if not content:
        return 0
    known = len(content) - content.count(0)
    if known == len(content):
        return 2 if 2 * content.count(2) >= len(content) else 1
    return 1 if 2 * known >= len(content) and 2 in content else 0


def _score_word(word: str, future: set[str], past: set[str]) -> int:
    if word in future:
        return 1 if word in STOP_WORDS else 2
    return 1 if word in past else 0
