"""A query's score from the judgements of its words."""

from __future__ import annotations

import math
from collections.abc import Sequence

from common.feedback.annotator import mark_repeats
from common.text import Word, normalise


def compose_query_scores(
    words: Sequence[Word], probabilities: Sequence[Sequence[float]], num_queries: int
) -> list[float]:
    """The chance that a query is relevant: no word of it is irrelevant, and one is very relevant; 0 without a word.

    `probabilities` (W, 3) are those of each word's classes, taken for independent of each other:
    `prod_j (1 - p_j0) - prod_j p_j1`. A word that its query said before is irrelevant, as in every annotator's labels.
    One wrong word spoils a query: a mean of word scores does not say so, and an output for queries learns it badly from
    one label a query (docs/results/findings.md).
    """
    scores = []
    for line in range(num_queries):
        own = [place for place, word in enumerate(words) if word.line == line]
        repeats = mark_repeats([normalise(words[place].text) for place in own])
        judged = [
            (0.0, 0.0) if repeated else (1 - probabilities[place][0], probabilities[place][1])
            for place, repeated in zip(own, repeats, strict=True)
        ]
        fit, none_very_relevant = (math.prod(column) for column in zip(*judged, strict=True)) if judged else (0.0, 0.0)
        scores.append(max(0.0, fit - none_very_relevant))
    return scores
