"""Each warning fires past its threshold and not at it, on metrics made by hand."""

from __future__ import annotations

import pytest

from common.evaluation.summary import MARKED_CHANGE, find_warnings, own_teacher_warning
from common.pages import findings
from common.pages.findings import (
    EXPLAINED_VARIANCE,
    FORMAT_ERRORS,
    HIGH_KL,
    LENGTH_DRIFT,
    WORD_GAP,
    evaluation_findings,
    judge_findings,
    run_findings,
    unchecked,
)

GOOD = {
    "reward/score_per_response": 1.0, "response/copy_rate": 0.1, "response/distinct_2": 0.7,
    "response/repeated_query_rate": 0.05, "response/repeated_word_rate": 0.02, "response/function_word_rate": 0.1,
    "response/format_error_rate": 0.1, "response/words_per_query": 2.0, "kl/per_sequence": 2.0,
    "judge/relevance_rate": 0.5, "judge/word_gap": 0.1, "value/explained_variance": 0.4,
}  # fmt: skip
NOISE = 1e-6  # less than any threshold, more than rounding


def rows(steps: int = 30, **last: float) -> list[dict[str, float]]:
    """`steps` good steps, of which the last ten have the metrics of `last` (with / written as __)."""
    changed = {name.replace("__", "/"): value for name, value in last.items()}
    return [{"step": step, **GOOD, **(changed if step >= steps - 10 else {})} for step in range(steps)]


def titles(found: list[findings.Finding]) -> list[str]:
    return [finding.title for finding in found]


def test_a_good_run_warns_of_nothing() -> None:
    assert run_findings(rows()) == [] and unchecked(rows()) == []


@pytest.mark.parametrize(
    ("metric", "limit", "sign", "title"),
    [
        ("response__copy_rate", 0.1 + MARKED_CHANGE, 1, "Copies from the history rose"),
        ("response__distinct_2", 0.7 - MARKED_CHANGE, -1, "Diversity fell"),
        ("response__repeated_query_rate", 0.05 + MARKED_CHANGE, 1, "Lists repeat their own queries more"),
        ("response__repeated_word_rate", 0.02 + MARKED_CHANGE, 1, "Queries repeat their own words more"),
        ("response__function_word_rate", 0.1 + MARKED_CHANGE, 1, "Function words rose"),
        ("response__format_error_rate", 0.1 + MARKED_CHANGE, 1, "Format errors rose"),
        ("judge__word_gap", 0.1 + WORD_GAP, 1, "The reward model overrates the policy's words more and more"),
        ("response__words_per_query", 2.0 * (1 + LENGTH_DRIFT), 1, "Queries got longer"),
        ("response__words_per_query", 2.0 * (1 - LENGTH_DRIFT), -1, "Queries got shorter"),
        ("kl__per_sequence", HIGH_KL, 1, "The policy is far from its reference"),
        ("value__explained_variance", EXPLAINED_VARIANCE + NOISE, -1, "The critic explains nothing"),
        ("judge__relevance_rate", 0.5 - MARKED_CHANGE, -1,
         "Over-optimisation: the judge turned away while the reward did not"),
    ],
)  # fmt: skip
def test_a_warning_fires_past_its_threshold_and_not_before(metric: str, limit: float, sign: int, title: str) -> None:
    assert run_findings(rows(**{metric: limit - sign * NOISE})) == []
    (found,) = run_findings(rows(**{metric: limit + 2 * sign * NOISE}))
    assert found.title == title and found.detail and found.next


def test_many_format_errors_are_said_even_if_they_were_always_there() -> None:
    always = [{**row, "response/format_error_rate": FORMAT_ERRORS + NOISE} for row in rows()]
    assert titles(run_findings(always)) == ["Many answers are no list of queries"]
    assert run_findings([{**row, "response/format_error_rate": FORMAT_ERRORS - NOISE} for row in rows()]) == []


def test_over_optimisation_needs_a_reward_that_did_not_fall() -> None:
    assert run_findings(rows(judge__relevance_rate=0.3, reward__score_per_response=0.9)) == []
    (found,) = run_findings(rows(judge__relevance_rate=0.3, reward__score_per_response=1.1))
    assert "fell from its best, 0.500, to 0.300" in found.detail


def test_short_runs_are_not_compared_with_themselves() -> None:
    short = rows(steps=19, response__copy_rate=0.9, kl__per_sequence=50.0)
    assert titles(run_findings(short)) == ["The policy is far from its reference"]
    assert titles(run_findings(rows(20, response__copy_rate=0.9))) == ["Copies from the history rose"]
    assert run_findings([]) == []


def test_a_run_without_a_metric_is_not_warned_of_it_and_told_so() -> None:
    old = [
        {name: value for name, value in row.items() if not name.startswith("judge/") and name != "response/copy_rate"}
        for row in rows(response__distinct_2=0.1)
    ]
    assert titles(run_findings(old)) == ["Diversity fell"]
    assert unchecked(old) == ["response/copy_rate", "judge/word_gap", "judge/relevance_rate"]


def test_steps_that_were_not_finite_are_left_out() -> None:
    found = rows(40, response__copy_rate=0.9)
    for row in found[::3]:
        row["response/copy_rate"] = None
    assert titles(run_findings(found)) == ["Copies from the history rose"]


def test_a_judge_that_taught_the_reward_model_is_named() -> None:
    found = judge_findings({"held-out users": "lexical", "the rollouts": "simulated"}, "lexical")
    assert titles(found) == ["The judge of held-out users is the reward model's own teacher"]
    assert found[0].detail == own_teacher_warning("lexical")
    (both,) = judge_findings({"held-out users": "lexical", "the rollouts": "lexical"}, "lexical")
    assert both.title.startswith("The judge of held-out users and of the rollouts is")
    assert judge_findings({"the rollouts": ""}, "") == []


def test_the_evaluation_s_own_warnings_are_passed_on_once() -> None:
    def metrics(copies: float) -> dict:
        names = ("copy_rate", "duplicate_rate", "format_error_rate", "distinct_2")
        return {"sampled": {name: {"value": copies if name == "copy_rate" else 0.1} for name in names}}

    warnings = find_warnings({"sft": metrics(0.1), "tppo": metrics(0.4)}, "lexical", "lexical")
    found = evaluation_findings({"annotator": "lexical", "warnings": warnings})
    assert [finding.detail for finding in found] == [
        "sampled decoding: copies from the history rose from 0.100 (sft) to 0.400 (tppo)."
    ]
