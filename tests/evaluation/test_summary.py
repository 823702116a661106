"""Scored rows, tables and comparisons against a case worked out by hand."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest

from common.evaluation import summary
from common.evaluation.statistics import estimate_means
from common.evaluation.summary import MEASURES
from tests.evaluation.factory import LetterJudge, make_examples

K = 3


def rows(*responses: str, finished: bool = True) -> list[dict]:
    return [
        {"id": f"e{i}", "response": response, "finished": finished, "tokens": len(response)}
        for i, response in enumerate(responses)
    ]


def test_scored_rows_hold_the_judges_scores() -> None:
    examples = make_examples()[:2]
    scored = summary.score_rows(examples, rows("shoes red\n\nthe shoes\n", ""), LetterJudge())
    assert scored[0]["words"] == [[2, 0], [], [0, 2]]
    assert scored[0]["queries"] == [2, 0, 0]
    assert (scored[0]["id"], scored[0]["user_id"], scored[0]["finished"]) == ("e0", "u0", True)
    assert (scored[1]["words"], scored[1]["queries"]) == ([], [])


def test_an_annotation_that_does_not_fit_is_refused() -> None:
    judge = LetterJudge()
    wrong = judge.annotate
    judge.annotate = lambda item: wrong(type(item)("", "", (), (), "one line"))
    with pytest.raises(ValueError, match="for 2 lines"):
        summary.score_rows(make_examples()[:1], rows("two\nlines"), judge)


def test_the_measures_of_a_response() -> None:
    # History: running shoes | running shoes for flat feet | best running socks; next: running shoes sale | running
    # shoes | socks. Letters modulo 3: sale 1, running 1, shoes 2, socks 2.
    example = make_examples()[0]
    (scored,) = summary.score_rows([example], rows("Running shoes\nrunning shoes\nsale socks"), LetterJudge())
    table = summary.measure_table([example], [scored], K)
    values = dict(zip(MEASURES, table[0], strict=True))
    assert values == pytest.approx({
        "relevance_rate": 1.0,
        "unique_relevance_rate": 2 / 3,
        "mean_word_score": (1 + 2 + 1 + 2 + 1 + 2) / 6,
        "recall": 1 / 3,
        "recall_new": 0.0,
        "recall_repeated": 1.0,
        "token_f1": (2 * 2 / 5 + 1.0 + 2 * 1 / 3) / 3,
        "copy_rate": 2 / 3,
        "duplicate_rate": 1 / 3,
        "words_per_query": 2.0,
        "tokens_per_response": 38.0,
        "format_error_rate": 0.0,
    })


def test_the_logged_queries_recall_themselves_and_have_no_tokens() -> None:
    examples = make_examples()
    gold = summary.score_rows(examples, summary.gold_rows(examples), LetterJudge())
    interval = partial(estimate_means, resamples=100, seed=0)
    users = [example.user_id for example in examples]
    metrics = summary.summarise(summary.measure_table(examples, gold, K), gold, users, interval, K)
    assert metrics["recall"] == {"value": 1.0, "low": 1.0, "high": 1.0, "n": 6}
    assert metrics["token_f1"]["value"] == metrics["recall_new"]["value"] == 1.0
    assert metrics["format_error_rate"]["value"] == 0.0
    assert metrics["tokens_per_response"] == {"value": None, "low": None, "high": None, "n": 0}
    # running shoes, tokyo weather, emoji meaning: three queries of 18, in lists of three.
    assert metrics["copy_rate"]["value"] == pytest.approx(3 / 18)
    assert metrics["recall_repeated"]["n"] == 3


def test_corpus_measures_have_no_interval() -> None:
    examples = make_examples()[:2]
    scored = summary.score_rows(examples, rows("red shoes\nred hat", "red shoes"), LetterJudge())
    metrics = summary.summarise(
        summary.measure_table(examples, scored, K), scored, ["a", "b"], partial(estimate_means, resamples=50, seed=0), K
    )
    assert metrics["distinct_1"] == {"value": pytest.approx(3 / 6), "low": None, "high": None, "n": 2}
    assert metrics["distinct_2"]["value"] == pytest.approx(2 / 3)


def test_compare_counts_items_and_pairs_differences() -> None:
    relevance = MEASURES.index("relevance_rate")
    copies = MEASURES.index("copy_rate")
    later, earlier = np.zeros((4, len(MEASURES))), np.zeros((4, len(MEASURES)))
    later[:, relevance] = [1.0, 2 / 3, 1 / 3, 1.0]
    earlier[:, relevance] = [1 / 3, 2 / 3, 2 / 3, 0.0]
    later[:, copies] = [0.5, math.nan, 0.0, 0.0]
    earlier[:, copies] = [0.0, 0.5, math.nan, 0.0]
    result = summary.compare(later, earlier, ["a", "a", "b", "c"], partial(estimate_means, resamples=500, seed=0))
    assert (result["win"], result["tie"], result["lose"], result["n"]) == (0.5, 0.25, 0.25, 4)
    assert result["intervals"]["win"] == {"value": 0.5, "low": 0.0, "high": 1.0, "n": 4}
    difference = result["differences"]["relevance_rate"]
    assert difference["value"] == pytest.approx((2 / 3 + 0 - 1 / 3 + 1) / 4)
    # Of users a (mean 1/3 of two), b (-1/3) and c (1): the worst draw is b alone, the best c alone.
    assert difference["low"] == pytest.approx(-1 / 3)
    assert difference["high"] == pytest.approx(1.0)
    assert (result["differences"]["copy_rate"]["value"], result["differences"]["copy_rate"]["n"]) == (0.25, 2)


def of(copy_rate: float, format_error_rate: float, distinct_2: float | None, duplicate_rate: float = 0.1) -> dict:
    values = {
        "copy_rate": copy_rate, "format_error_rate": format_error_rate, "distinct_2": distinct_2,
        "duplicate_rate": duplicate_rate,
    }
    return {name: {"value": value} for name, value in values.items()}


def test_warnings() -> None:
    calm = {"sft": {"sampled": of(0.10, 0.02, 0.90)}, "tppo": {"sampled": of(0.14, 0.00, 0.86)}}
    assert summary.find_warnings(calm, "lexical", "simulated") == []
    assert "its own teacher" in summary.find_warnings(calm, "lexical", "lexical")[0]
    alarming = {
        "sft": {"sampled": of(0.10, 0.02, 0.90), "greedy": of(0.1, 0.1, None)},
        "ppo": {"sampled": of(0.90, 0.90, 0.10), "greedy": of(0.1, 0.1, None)},
        "tppo": {"sampled": of(0.30, 0.12, 0.70), "greedy": of(0.2, 0.1, None, 0.4)},
    }
    assert summary.find_warnings(alarming, "lexical", "") == [
        "sampled decoding: copies from the history rose from 0.100 (sft) to 0.300 (tppo).",
        "sampled decoding: format errors rose from 0.020 (sft) to 0.120 (tppo).",
        "sampled decoding: distinct-2 fell from 0.900 (sft) to 0.700 (tppo).",
        "greedy decoding: copies from the history rose from 0.100 (sft) to 0.200 (tppo).",
        "greedy decoding: duplicates in a list rose from 0.100 (sft) to 0.400 (tppo).",
    ]
