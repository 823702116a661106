"""The language model as judge: whole queries scored, and two systems' lists compared in both orders.

Two levels, as in the paper: the sentence-level templates show queries alone, the token-and-sentence-level ones have
words scored before queries and before the verdict (docs/method.md, section 7).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from common.data.records import Event
from common.feedback.annotator import FeedbackItem, Unlabelled, words_by_query
from common.feedback.llm.model import LanguageModel, Question
from common.feedback.llm.prompts import Template, lines_with_words, load_template, shown_history, shown_queries
from common.feedback.llm.schemas import (
    Verdict,
    check_scores,
    parse,
    parse_query_scores,
    query_form,
    scored_verdict_form,
)
from common.feedback.llm.workers import ask_all
from common.text import split_queries

SENTENCE, WORDS = "sentence", "words"
LEVELS = (SENTENCE, WORDS)
COMPARE_TEMPLATES = {SENTENCE: "compare_sentence_v1", WORDS: "compare_words_v1"}
SENTENCE_TEMPLATE = "judge_sentence_v1"


@dataclass(frozen=True)
class Pair:
    """Two responses to one history; a verdict is about the first."""

    history: tuple[Event, ...]
    first: str
    second: str


@dataclass(frozen=True)
class Comparison:
    """What became of a pair.

    `verdict` is win, tie or lose of the first response, None when an order got no valid answer (`failures` counts
    them). `flipped` says that the two orders disagreed, which makes a tie. `asked` is False for equal lists, which tie.
    """

    verdict: str | None
    flipped: bool = False
    failures: int = 0
    asked: bool = True


class _Shown(NamedTuple):
    """One order of a pair: the list shown as A and the one shown as B."""

    history: tuple[Event, ...]
    a: str
    b: str


def score_whole_queries(
    model: LanguageModel, items: Sequence[FeedbackItem], progress: str
) -> list[tuple[int, ...] | Unlabelled]:
    """A score for each line of each response, by the sentence-level template; raises as `workers.ask_all`."""
    template = load_template(SENTENCE_TEMPLATE)

    def question(item: FeedbackItem) -> Question[tuple[int, ...]] | tuple[int, ...]:
        asked = lines_with_words(item.response)
        if not asked:
            return (0,) * len(words_by_query(item.response))
        messages = template.messages(
            history=shown_history(item.history, model.options.history_events), queries=shown_queries(item.response)
        )
        form = query_form(item.response)
        return Question(template, messages, form, lambda text: parse_query_scores(text, item.response), len(asked))

    return _gather(model, items, question, progress)


def compare_pairs(model: LanguageModel, pairs: Sequence[Pair], level: str, progress: str) -> list[Comparison]:
    """Each pair asked in both orders: the same winner twice wins, anything else is a tie.

    Raises as `workers.ask_all`; a question is one order of a pair.
    """
    template = load_template(COMPARE_TEMPLATES[level])
    shown = [
        order
        for pair in pairs
        if not _equal(pair)
        for order in (_Shown(pair.history, pair.first, pair.second), _Shown(pair.history, pair.second, pair.first))
    ]
    verdicts = iter(_gather(model, shown, lambda order: _comparison(model, template, level, order), progress))
    return [
        Comparison("tie", asked=False) if _equal(pair) else combine(next(verdicts), next(verdicts)) for pair in pairs
    ]


def combine(forward: str | Unlabelled, backward: str | Unlabelled) -> Comparison:
    """The comparison of two verdicts (A, B, tie): the first response is A in `forward` and B in `backward`."""
    failures = isinstance(forward, Unlabelled) + isinstance(backward, Unlabelled)
    if failures:
        return Comparison(None, failures=failures)
    results = {"A": "win", "B": "lose", "tie": "tie"}[forward], {"A": "lose", "B": "win", "tie": "tie"}[backward]
    same = results[0] == results[1]
    return Comparison(results[0] if same else "tie", flipped=not same)


def _comparison(model: LanguageModel, template: Template, level: str, order: _Shown) -> Question[str]:
    list_a, list_b = shown_queries(order.a), shown_queries(order.b)
    messages = template.messages(
        history=shown_history(order.history, model.options.history_events), list_a=list_a, list_b=list_b
    )
    if level == SENTENCE:
        return Question(template, messages, Verdict, lambda text: parse(text, Verdict)["verdict"], 1)
    scores = 1 + sum(1 + len(query["words"]) for query in (*list_a, *list_b))
    form = scored_verdict_form(order.a, order.b)
    return Question(template, messages, form, lambda text: _scored_verdict(text, order), scores)


def _scored_verdict(text: str, order: _Shown) -> str:
    """The verdict, once the scores before it have been found to fit both lists."""
    answer = parse(text, scored_verdict_form(order.a, order.b))
    check_scores(answer["a"], order.a)
    check_scores(answer["b"], order.b)
    return answer["verdict"]


def _gather(model: LanguageModel, items: Sequence[Any], question: Callable, progress: str) -> list[Any]:
    values: list[Any] = [None] * len(items)
    ask_all(model, items, question, values.__setitem__, progress)
    return values


def _equal(pair: Pair) -> bool:
    return split_queries(pair.first) == split_queries(pair.second)
