"""What a language model as judge adds to a report: relevance by its sentence-level template, and pairwise verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from common.data.records import Example
from common.evaluation import metrics
from common.evaluation.statistics import Estimate
from common.evaluation.summary import Interval, Row
from common.feedback.annotator import FeedbackItem, Unlabelled
from common.feedback.llm.annotator import LLMAnnotator
from common.feedback.llm.judge import (
    COMPARE_TEMPLATES,
    LEVELS,
    SENTENCE,
    SENTENCE_TEMPLATE,
    WORDS,
    Comparison,
    Pair,
    compare_pairs,
    score_whole_queries,
)
from common.feedback.llm.prompts import load_template
from common.text import split_queries

OUTCOMES = ("win", "tie", "lose")


def judge_systems(
    judge: LLMAnnotator,
    examples: Sequence[Example],
    rows: Mapping[str, Sequence[Row]],
    interval: Interval,
    k: int,
) -> dict[str, Any]:
    """The report's `judge` part, from each system's scored rows under the main decoding.

    `relevance.<level>.<system>` holds `relevance_rate` and `failure_rate`; the level words is the judge's label_words
    template, which `rows` were scored by. `comparisons.<level>.<later>_vs_<earlier>` holds `win`, `tie`, `lose` (means
    over the decided items with intervals), `flip_rate` of the decided items that were asked about, `failure_rate` of
    the answers, and counts. Only the first k lines of a response are compared.
    """
    model = judge.model
    users = [example.user_id for example in examples]
    relevance: dict[str, Any] = {WORDS: {}, SENTENCE: {}}
    for name, of_system in rows.items():
        relevance[WORDS][name] = _relevance([row["queries"] for row in of_system], users, interval, k)
        items = [FeedbackItem.of(example, row["response"]) for example, row in zip(examples, of_system, strict=True)]
        scores = score_whole_queries(model, items, f"judge {name}, {SENTENCE}")
        given = [None if isinstance(line_scores, Unlabelled) else line_scores for line_scores in scores]
        relevance[SENTENCE][name] = _relevance(given, users, interval, k)
    comparisons = {
        level: {
            f"{later}_vs_{earlier}": summarise_comparisons(
                compare_pairs(
                    model, _pairs(examples, rows[later], rows[earlier], k), level, f"{later} vs {earlier}, {level}"
                ),
                users,
                interval,
            )
            for earlier, later in combinations(rows, 2)
        }
        for level in LEVELS
    }
    return {
        "model": model.options.model,
        "templates": {
            "relevance": {WORDS: judge.template.title, SENTENCE: load_template(SENTENCE_TEMPLATE).title},
            "comparisons": {level: load_template(name).title for level, name in COMPARE_TEMPLATES.items()},
        },
        "relevance": relevance,
        "comparisons": comparisons,
        "asked": {
            "requests": model.meter.requests, "answers": model.meter.answers, "cost": model.meter.cost,
            "prompt_tokens": model.meter.prompt_tokens, "answer_tokens": model.meter.answer_tokens,
        },
    }  # fmt: skip


def summarise_comparisons(
    comparisons: Sequence[Comparison], users: Sequence[str], interval: Interval
) -> dict[str, Any]:
    """Shares of items won, tied and lost, and how far the judge can be trusted; an undecided item is in no share."""
    shares = np.array(
        [
            [np.nan if item.verdict is None else float(item.verdict == outcome) for outcome in OUTCOMES]
            for item in comparisons
        ]
    )
    decided = [item for item in comparisons if item.asked and item.verdict is not None]
    asked = [item for item in comparisons if item.asked]
    return {
        **{name: share.to_dict() for name, share in zip(OUTCOMES, interval(shares, users), strict=True)},
        "flip_rate": _share(sum(item.flipped for item in decided), len(decided)),
        "failure_rate": _share(sum(item.failures for item in asked), 2 * len(asked)),
        "undecided": len(asked) - len(decided),
        "equal_lists": len(comparisons) - len(asked),
    }


def _relevance(
    query_scores: Sequence[Sequence[int] | None], users: Sequence[str], interval: Interval, k: int
) -> dict[str, Any]:
    rates = [np.nan if scores is None else metrics.relevance_rate(scores, k) for scores in query_scores]
    estimate: Estimate = interval(np.array(rates, dtype=float)[:, None], users)[0]
    failed = sum(scores is None for scores in query_scores)
    return {"relevance_rate": estimate.to_dict(), "failure_rate": _share(failed, len(query_scores))}


def _pairs(examples: Sequence[Example], later: Sequence[Row], earlier: Sequence[Row], k: int) -> list[Pair]:
    return [
        Pair(example.history, _first_lines(new["response"], k), _first_lines(old["response"], k))
        for example, new, old in zip(examples, later, earlier, strict=True)
    ]


def _first_lines(response: str, k: int) -> str:
    return "\n".join(split_queries(response)[:k])


def _share(count: int, total: int) -> float | None:
    return count / total if total else None
