"""From responses to the report: scored rows, a table of measures a system, means with intervals, comparisons.

A table is (N, M), a row an example and a column one of `MEASURES`, NaN where the measure is undefined. Tables of all
systems have the same examples in the same order, so that differences are paired.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from common.data.records import Example
from common.evaluation import metrics
from common.evaluation.statistics import Estimate, paired_outcomes
from common.feedback.annotator import (
    Annotation,
    Annotator,
    BatchAnnotator,
    FeedbackItem,
    Unlabelled,
    annotate_all,
    check_annotation,
)
from common.text import split_queries

MEASURES = (
    "relevance_rate", "unique_relevance_rate", "mean_word_score", "recall", "recall_new", "recall_repeated",
    "token_f1", "copy_rate", "duplicate_rate", "words_per_query", "tokens_per_response", "format_error_rate",
)
JUDGED_MEASURES = MEASURES[:3]  # the annotator's; the others are read off the texts
CORPUS_MEASURES = ("distinct_1", "distinct_2")
# A change of a share by more than this from the first system to the last is worth a warning.
MARKED_CHANGE = 0.05

Row = dict[str, Any]
Metrics = dict[str, dict[str, Any]]
# `statistics.estimate_means` with the resamples and the seed of one report.
Interval = Callable[[np.ndarray, Sequence[str]], list[Estimate]]


def score_rows(
    examples: Sequence[Example], rows: Sequence[Row], annotator: Annotator | BatchAnnotator, progress: str = ""
) -> list[Row]:
    """Rows of `generate_rows` with the annotator's scores: `words` (a list for each line) and `queries` (one a line).

    Both are None where the annotator gave no valid answer; what they decide is then undefined, not 0. Raises
    `ValueError` for an annotation that does not fit its response.
    """
    items = [FeedbackItem.of(example, row["response"]) for example, row in zip(examples, rows, strict=True)]
    scored: list[Row] = [
        {**row, "user_id": item.user_id, "words": None, "queries": None} for item, row in zip(items, rows, strict=True)
    ]

    def done(place: int, result: Annotation | Unlabelled) -> None:
        if isinstance(result, Annotation):
            check_annotation(result, items[place].response)
            scored[place]["words"] = [list(scores) for scores in result.word_scores]
            scored[place]["queries"] = list(result.query_scores)

    annotate_all(annotator, items, done, progress)
    return scored


def gold_rows(examples: Sequence[Example]) -> list[Row]:
    """The logged next queries themselves as responses: what imitation alone could reach at best."""
    return [
        {"id": example.id, "response": "\n".join(" ".join(target.split()) for target in example.targets),
         "finished": True, "tokens": None}
        for example in examples
    ]


def measure_table(examples: Sequence[Example], rows: Sequence[Row], k: int) -> np.ndarray:
    """The measures of scored rows, (N, M)."""
    measured = [_measure_row(example, row, k) for example, row in zip(examples, rows, strict=True)]
    return np.array([[row[name] for name in MEASURES] for row in measured], dtype=float)


def summarise(table: np.ndarray, rows: Sequence[Row], users: Sequence[str], interval: Interval, k: int) -> Metrics:
    """`{measure: {value, low, high, n}}` of one system under one decoding.

    Distinct-n belongs to the corpus and has no interval: a resample repeats users, and repeats alone lower it.
    """
    summary = {
        name: estimate.to_dict() for name, estimate in zip(MEASURES, interval(table, users), strict=True)
    }
    lines = [split_queries(row["response"]) for row in rows]
    for n, name in enumerate(CORPUS_MEASURES, start=1):
        value = metrics.distinct_n(lines, n, k)
        summary[name] = Estimate(value, None, None, len(rows)).to_dict()
    return summary


def compare(later: np.ndarray, earlier: np.ndarray, users: Sequence[str], interval: Interval) -> dict[str, Any]:
    """Two systems on the same items: shares of items that the later one wins, ties and loses, and paired differences.

    An item is won by more relevant queries among the first k (docs/method.md, section 7). Differences are later minus
    earlier, over the examples on which both are defined.
    """
    relevance = MEASURES.index("relevance_rate")
    outcomes = interval(paired_outcomes(later[:, relevance], earlier[:, relevance]), users)
    intervals = {name: share.to_dict() for name, share in zip(("win", "tie", "lose"), outcomes, strict=True)}
    differences = interval(later - earlier, users)
    return {
        **{name: share["value"] for name, share in intervals.items()},
        "n": len(later),
        "intervals": intervals,
        "differences": {name: change.to_dict() for name, change in zip(MEASURES, differences, strict=True)},
    }


def find_warnings(
    systems: Mapping[str, Mapping[str, Metrics]], judge: str, reward_annotator: str
) -> list[str]:
    """What a reader must know before believing the table.

    `systems` maps a name to its metrics by decoding, in the order of training. A policy that copies the history,
    repeats itself, says the same to everybody or breaks the format may still win relevance.
    """
    found = [own_teacher_warning(judge)] if judge == reward_annotator else []
    first, last = next(iter(systems)), list(systems)[-1]
    for decoding in systems[first]:
        before, after = systems[first][decoding], systems[last][decoding]
        for measure, text, worse in (
            ("copy_rate", "copies from the history rose", 1),
            ("duplicate_rate", "duplicates in a list rose", 1),
            ("format_error_rate", "format errors rose", 1),
            ("distinct_2", "distinct-2 fell", -1),
        ):
            start, end = before[measure]["value"], after[measure]["value"]
            if start is not None and end is not None and worse * (end - start) > MARKED_CHANGE:
                found.append(f"{decoding} decoding: {text} from {start:.3f} ({first}) to {end:.3f} ({last}).")
    return found


def own_teacher_warning(judge: str) -> str:
    """What to say when the judge is the annotator whose labels trained the reward model."""
    return (
        f"The judge ({judge}) is the annotator that the reward model was trained on: the tuned system is scored "
        "by its own teacher, so its gain is optimistic."
    )


def _measure_row(example: Example, row: Row, k: int) -> dict[str, float | None]:
    queries = split_queries(row["response"])
    new, repeated = metrics.new_and_repeated(example.targets, example.searched)
    judged: dict[str, float | None] = dict.fromkeys(JUDGED_MEASURES)
    if row["queries"] is not None:
        judged = {
            "relevance_rate": metrics.relevance_rate(row["queries"], k),
            "unique_relevance_rate": metrics.unique_relevance_rate(queries, row["queries"], k),
            "mean_word_score": metrics.mean_word_score(row["words"], k),
        }
    return {
        **judged,
        "recall": metrics.target_recall(queries, example.targets, k),
        "recall_new": metrics.target_recall(queries, new, k),
        "recall_repeated": metrics.target_recall(queries, repeated, k),
        "token_f1": metrics.best_match_f1(queries, example.targets, k),
        "copy_rate": metrics.copy_rate(queries, example.searched, k),
        "duplicate_rate": metrics.duplicate_rate(queries, k),
        "words_per_query": metrics.words_per_query(queries, k),
        "tokens_per_response": row["tokens"],
        "format_error_rate": metrics.has_format_error(queries, row["finished"], k),
    }
