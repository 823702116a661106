"""The judge: both orders asked, disagreement a tie, failures counted and never taken for a verdict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import annotator_server
from benchmarks.annotator_server import RIGHT, Endpoint, score_of
from common.data.records import Event
from common.evaluation.judging import summarise_comparisons
from common.evaluation.statistics import estimate_means
from common.feedback.annotator import Unlabelled
from common.feedback.llm.judge import (
    LEVELS,
    SENTENCE,
    WORDS,
    Comparison,
    Pair,
    combine,
    compare_pairs,
    score_whole_queries,
)
from tests.feedback.endpoint import annotator, item, options, serving

HISTORY = (Event("search", query="running shoes"),)
FAILED = Unlabelled("no answer")


@pytest.mark.parametrize(
    ("forward", "backward", "verdict", "flipped"),
    [
        ("A", "B", "win", False),
        ("B", "A", "lose", False),
        ("tie", "tie", "tie", False),
        ("A", "A", "tie", True),
        ("B", "B", "tie", True),
        ("A", "tie", "tie", True),
        ("tie", "A", "tie", True),
    ],
)
def test_two_orders_make_one_verdict(forward: str, backward: str, verdict: str, flipped: bool) -> None:
    assert combine(forward, backward) == Comparison(verdict, flipped)


def test_a_failed_order_leaves_the_pair_undecided() -> None:
    assert combine("A", FAILED) == combine(FAILED, "B") == Comparison(None, failures=1)
    assert combine(FAILED, FAILED) == Comparison(None, failures=2)


def texts_with_sums() -> list[str]:
    """Single queries that the endpoint scores 0, 1 and 2."""
    found: dict[int, str] = {}
    for number in range(100):
        found.setdefault(score_of(f"shoes {number}"), f"shoes {number}")
    return [found[score] for score in (0, 1, 2)]


@pytest.mark.parametrize("level", LEVELS)
def test_the_better_list_wins_in_whatever_place_it_stands(level: str, tmp_path: Path) -> None:
    bad, fair, good = texts_with_sums()
    pairs = [Pair(HISTORY, good, bad), Pair(HISTORY, bad, fair), Pair(HISTORY, fair, fair), Pair(HISTORY, good, fair)]
    with serving(endpoint := Endpoint()) as url, annotator(options(url), tmp_path / "answers.jsonl") as judge:
        results = compare_pairs(judge.model, pairs, level, "test")
    assert [result.verdict for result in results] == ["win", "lose", "tie", "win"]
    assert [result.asked for result in results] == [True, True, False, True]
    assert not any(result.flipped for result in results)
    assert len(endpoint.seen) == 6  # both orders of three pairs
    assert {body["response_format"]["json_schema"]["name"] for body in endpoint.seen} == {
        "Verdict" if level == SENTENCE else "ScoredVerdict"
    }
    shown = [[part.split("query 1: ")[1].split("\n")[0] for part in body["messages"][1]["content"].split("<list")[1:]]
             for body in endpoint.seen]  # fmt: skip
    assert sorted(shown) == sorted([[good, bad], [bad, good], [bad, fair], [fair, bad], [good, fair], [fair, good]])


@pytest.mark.parametrize("level", LEVELS)
def test_a_judge_who_always_prefers_the_first_decides_nothing(
    level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fair_verdict = annotator_server._verdict

    def biased(prompt: str, with_words: bool) -> dict[str, Any]:
        return {**fair_verdict(prompt, with_words), "verdict": "A"}

    monkeypatch.setattr(annotator_server, "_verdict", biased)
    bad, fair, good = texts_with_sums()
    pairs = [Pair(HISTORY, good, bad), Pair(HISTORY, bad, fair)]
    with serving(Endpoint()) as url, annotator(options(url), tmp_path / "answers.jsonl") as judge:
        results = compare_pairs(judge.model, pairs, level, "test")
    assert results == [Comparison("tie", flipped=True)] * 2


def test_an_order_without_a_valid_answer_is_no_verdict(tmp_path: Path) -> None:
    """At the level of words the scores before the verdict must fit both lists."""
    bad, fair, good = texts_with_sums()
    spoilt = Endpoint(
        choose=lambda _, body: "broken_json" if body["messages"][1]["content"].count(f"1: {bad}\n") else RIGHT
    )
    with serving(spoilt) as url, annotator(options(url), tmp_path / "answers.jsonl") as judge:
        results = compare_pairs(judge.model, [Pair(HISTORY, good, bad), Pair(HISTORY, good, fair)], WORDS, "test")
    assert results == [Comparison(None, failures=2), Comparison("win")]


def test_whole_queries_are_scored_line_by_line(tmp_path: Path) -> None:
    items = [item(0, "trail shoes\n\nred hat"), item(1, ""), item(2, "felt")]
    with serving(endpoint := Endpoint()) as url, annotator(options(url), tmp_path / "answers.jsonl") as judge:
        scores = score_whole_queries(judge.model, items, "test")
    assert scores == [(score_of("trail shoes"), 0, score_of("red hat")), (), (score_of("felt"),)]
    assert len(endpoint.seen) == 2


def test_shares_flips_and_failures_by_hand() -> None:
    """Of seven pairs one has equal lists and one is undecided: shares are of six, flips of five that were decided."""
    comparisons = [
        Comparison("win"), Comparison("win"), Comparison("lose"), Comparison("tie", flipped=True), Comparison("tie"),
        Comparison("tie", asked=False), Comparison(None, failures=1),
    ]  # fmt: skip

    def interval(values: np.ndarray, users: list[str]) -> list:
        return estimate_means(values, users, 200, 0)

    summary = summarise_comparisons(comparisons, [str(number) for number in range(7)], interval)
    assert [summary[name]["value"] for name in ("win", "tie", "lose")] == [
        pytest.approx(share) for share in (2 / 6, 3 / 6, 1 / 6)
    ]
    assert {summary[name]["n"] for name in ("win", "tie", "lose")} == {6}
    assert summary["flip_rate"] == pytest.approx(1 / 5)
    assert summary["failure_rate"] == pytest.approx(1 / 12)
    assert (summary["undecided"], summary["equal_lists"]) == (1, 1)
