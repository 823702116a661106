"""From records to tables: means, differences and reach times by hand, the choice of settings, and the whole page."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.evaluation.report import escape
from common.files import read_json, write_json
from study.aggregate import at_equal_kl, compare, group_runs, rollouts_to_reach, smoothed, summarise_system
from study.goal import goal_section
from study.jobs import Job
from study.records import Records, pack, unpack
from study.report import write_results
from study.search import choose
from study.settings import COMPARED, CONTROLS, DPO_SEARCH, MAX_KL, PPO_SEARCH, PPO_SYSTEMS, SYSTEMS


def _judged(relevant: list[int], recall: list[float | None]) -> dict:
    means = {
        "relevance_rate": sum(relevant) / len(relevant) / 2, "unique_relevance_rate": 0.1, "mean_word_score": 1.0,
        "recall": 0.1, "recall_new": 0.1, "recall_repeated": None, "token_f1": 0.2, "copy_rate": 0.0,
        "duplicate_rate": 0.0, "distinct_2": 0.5, "words_per_query": 3.0, "format_error_rate": 0.0,
        "repeated_word_rate": 0.0, "function_word_rate": 0.1,
    }  # fmt: skip
    unique = [min(count, 1) for count in relevant]
    return {"means": means, "relevant": relevant, "unique": unique, "recall": recall,
            "by_length": {"1": [60, 3], "3": [90, 80]}}  # fmt: skip


def _measure(relevant: list[int], kl: float | None = 1.0, recall: list[float | None] | None = None) -> dict:
    judged = {judge: _judged(relevant, recall or [0.0] * len(relevant)) for judge in ("simulated", "lexical")}
    example = {"history": ["red | shoes"], "targets": ["ties"], "sampled": "a <b>\nc", "greedy": "d"}
    return {"users": [str(i) for i in range(len(relevant))], "kl": kl, "examples": [example],
            "decodings": {"sampled": judged, "greedy": judged}}  # fmt: skip


def _job(name: str, step3: bool = True) -> Job:
    commands = [("study.measure", ("--num_queries", "2"))]
    return Job(name, ((("step3_tppo.main", ()),) if step3 else ()) + tuple(commands))


def _write(work: Path, records: Records, name: str, measure: dict, relevance: list[float] | None = None) -> None:
    write_json(work / name / "measure.json", measure)
    if relevance is not None:
        names = ("judge/relevance_rate", "judge/mean_word_score", "judge/word_gap", "judge/word_calibration_error",
                 "reward/score_per_response", "value/explained_variance", "policy/max_ratio",
                 "response/format_error_rate", "response/words_per_query")  # fmt: skip
        rows = [
            {"step": step, **dict.fromkeys(names, value), "kl/per_sequence": float(step), "seconds/step": 2.0}
            for step, value in enumerate(relevance)
        ]
        (work / name / "run").mkdir(parents=True, exist_ok=True)
        (work / name / "run" / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
        profile = {"step": 0, "tokens": [9.0, 5.0], "reward": [0.1, 0.2], "value": [0.0, 0.0], "credit": [1.0, 0.5]}
        (work / name / "run" / "profiles.jsonl").write_text(json.dumps(profile) + "\n")
    records.write(_job(name, relevance is not None), work / name, 12.3, "mark")


def test_differences_by_hand(tmp_path: Path) -> None:
    records = Records(tmp_path / "records")
    for seed, (first, second) in enumerate([([2, 1, 0], [1, 1, 1]), ([2, 2, 0], [0, 2, 1])], start=1):
        _write(tmp_path, records, f"main/s{seed}/tppo", _measure(first, recall=[0.5, None, 0.0]))
        _write(tmp_path, records, f"main/s{seed}/ppo_query", _measure(second, recall=[0.0, None, 0.0]))
    runs = group_runs(dict(records.read()))["main"]
    found = compare(runs["tppo"], runs["ppo_query"], "sampled", "simulated")
    # Seed 1: +1 0 -1; seed 2: +2 0 -1; of two queries a response.
    assert found["relevance_rate"]["mean"] == pytest.approx((0 + 1) / 6 / 2)
    assert found["item_win_rate"]["mean"] == pytest.approx(0)
    assert [found[name]["mean"] for name in ("win", "tie", "lose")] == pytest.approx([1 / 3] * 3)
    # At most one of a list is unique here: seed 1: 0 0 -1; seed 2: +1 0 -1.
    assert found["unique_relevance_rate"]["mean"] == pytest.approx(-1 / 6 / 2)
    assert found["unique_item_win_rate"]["mean"] == pytest.approx(-1 / 6)
    assert found["recall"]["mean"] == pytest.approx(0.25)
    summary = summarise_system(runs["tppo"], "simulated")
    assert summary["relevance_rate"]["seeds"] == pytest.approx([0.5, 2 / 3], abs=1e-4)
    assert summary["recall_repeated"]["mean"] is None


def test_several_responses_to_a_user_are_one_user(tmp_path: Path) -> None:
    records = Records(tmp_path / "records")
    for system, relevant in (("tppo", [2, 1, 0, 1]), ("sft", [1, 1, 1, 1])):
        _write(tmp_path, records, f"main/s1/{system}", {**_measure(relevant), "users": ["u", "v"]})
    runs = group_runs(dict(records.read()))["main"]
    found = compare(runs["tppo"], runs["sft"], "sampled", "simulated")
    # u: +1 and 0, v: -1 and 0; of two queries a response. The interval resamples the two users' means, 1/4 and -1/4.
    assert found["relevance_rate"] == {"mean": 0, "low": pytest.approx(-0.25), "high": pytest.approx(0.25)}
    assert [found[name]["mean"] for name in ("win", "tie", "lose")] == pytest.approx([1 / 4, 1 / 2, 1 / 4])


@given(st.lists(st.one_of(st.none(), st.integers(0, 20).map(float)), min_size=1))
def test_packed_lists_come_back(values: list[float | None]) -> None:
    packed = json.loads(json.dumps(pack(values)))
    assert [None if np.isnan(value) else value for value in unpack(packed)] == values


def test_running_mean_by_hand() -> None:
    curve = np.array([1.0, 3.0, 5.0, 7.0, 9.0, 11.0, 13.0])
    assert smoothed(curve) == pytest.approx([1, 2, 3, 4, 5, 7, 9])


def test_rollouts_to_reach_and_relevance_at_a_kl(tmp_path: Path) -> None:
    records = Records(tmp_path / "records")
    _write(tmp_path, records, "main/s1/tppo", _measure([1]), [0.2, 0.4, 0.6, 0.8])
    _write(tmp_path, records, "main/s1/ppo_query", _measure([1]), [0.2, 0.3, 0.4, 0.5])
    runs = group_runs(dict(records.read()))["main"]
    # Running means: .2 .3 .4 .5 and .2 .25 .3 .35; the second's last level is passed by the first at its third step.
    reach = rollouts_to_reach(runs)
    assert reach["ppo_query_final"] == {"tppo": 3 * 64, "ppo_query": 4 * 64}
    assert reach["tppo_final"] == {"tppo": 4 * 64, "ppo_query": None}
    # KL 0 1 2 3, its running mean 0 .5 1 1.5
    assert at_equal_kl(runs, (0.5, 9.0)) == {"tppo": [pytest.approx(0.3), None], "ppo_query": [0.25, None]}


def test_the_search_takes_the_best_within_the_kl(tmp_path: Path) -> None:
    records = Records(tmp_path / "records")
    for arm in COMPARED:
        for number in range(len(PPO_SEARCH)):
            # Point 2 is best and drifts too far; 1 is best of the others.
            relevant, kl = {1: ([2, 1], MAX_KL - 0.1), 2: ([2, 2], MAX_KL + 0.1)}.get(number, ([1, 1], 1.0))
            _write(tmp_path, records, f"search/s0/{arm}-{number}", _measure(relevant, kl))
    for number in range(len(DPO_SEARCH)):
        _write(tmp_path, records, f"search/s0/dpo-{number}", _measure([1, 1], 7.0 + number))
    found = choose(dict(records.read()))
    assert found["chosen"]["tppo"] == found["tried"]["tppo"][1]["settings"]
    assert found["chosen"]["dpo"] == found["tried"]["dpo"][0]["settings"]
    assert len(found["tried"]["ppo_query"]) == len(PPO_SEARCH)


def test_results_have_the_keys_that_other_tools_read(tmp_path: Path) -> None:
    records = Records(tmp_path / "records")
    generator = np.random.default_rng(0)
    for axis in ("main", "budget150", "noise0.2", "k5", "ablation_copy", "real"):
        for seed in (1, 2):
            for system in SYSTEMS if axis in ("main", "real") else COMPARED:
                curve = [0.2, 0.3, 0.4] if system in PPO_SYSTEMS else None
                measure = _measure(generator.integers(0, 3, size=20).tolist())
                _write(tmp_path, records, f"{axis}/s{seed}/{system}", measure, curve)
    for control in CONTROLS:
        _write(tmp_path, records, f"main/s0/{control}", _measure([1, 0, 2], None))
    write_results(tmp_path)
    results = read_json(tmp_path / "reproduction.json")
    for name in ("sft", "ppo_response", "ppo_query", "dpo", "tppo"):
        assert set(results["systems"][name]["relevance_rate"]) == {"mean", "low", "high", "seeds"}
        assert set(results["systems"][name]["greedy"]["relevance_rate"]) == {"mean", "low", "high", "seeds"}
    for measure in ("relevance_rate", "item_win_rate", "recall"):
        for place in (results, results["label_budget"]["150"]):
            assert set(place["differences"]["tppo_minus_ppo_response"][measure]) == {"mean", "low", "high"}
    assert results["rollouts_to_reach"]["ppo_response_final"]["tppo"] == 3 * 64
    assert results["ablations"]["copy"]["max_ratio"] == pytest.approx(0.4)  # the largest of the made-up curves
    assert results["rollouts"] == 3 * 64
    page = (tmp_path / "README.md").read_text()
    assert page.splitlines()[2].startswith("**The goal is not reached: ")
    assert escape("red | shoes") in page and escape("a <b> / c") in page and "<b>" not in page
    for name in ("ppo_curves", "relevance_and_kl", "credit", "ablations", "query_length", "over_optimisation"):
        assert (tmp_path / "figures" / f"{name}.png").stat().st_size > 5000
        assert f"figures/{name}.png" in page


def test_every_part_of_the_goal_by_hand() -> None:
    def difference(points: float, low: float) -> dict:
        estimate = {"mean": points / 100, "low": low / 100, "high": 1.0}
        return {"relevance_rate": estimate, "item_win_rate": {**estimate, "mean": 2 * points / 100}}

    def results(points: float, low: float = 0.1, kl: float = 2.0, reach: int | None = 96) -> dict:
        both = {**difference(points, low), "greedy": difference(points, low)}
        differences = {f"tppo_minus_{baseline}": both for baseline in ("ppo_response", "ppo_query")}
        systems = {name: {"kl": {"mean": 2.0}} for name in COMPARED}
        systems["tppo"] = {"kl": {"mean": kl}, "relevance_rate": {"seeds": [0.5, 0.6]}}
        few = {"differences": differences, "systems": {"tppo": {"relevance_rate": {"seeds": [0.4, 0.5, 0.6]}}}}
        return {
            "differences": differences, "systems": systems, "label_budget": {"150": few},
            "rollouts": 192, "rollouts_to_reach": {"ppo_response_final": {"tppo": reach}},
        }  # fmt: skip

    assert goal_section(results(8.0)).startswith("**The goal is reached.**")
    assert "seeds: 2 (150 labelled users: 3).\n" in goal_section(results(8.0))
    # With all labels 4, 8 and 2 points are wanted; with few twice that: 8, 16, 4. Each sampled and greedy.
    assert "not reached: 4 of 15 parts" in goal_section(results(7.9))
    assert "not reached: 10 of 15 parts" in goal_section(results(3.9))
    assert "not reached: 12 of 15 parts" in goal_section(results(8.0, low=0.0))
    assert "not reached: 2 of 15 parts" in goal_section(results(8.0, kl=2.1))
    assert "not reached: 1 of 15 parts fails" in goal_section(results(8.0, reach=128))
    assert "not reached: 1 of 15 parts fails" in goal_section(results(8.0, reach=None))


def test_a_page_without_runs_says_so(tmp_path: Path) -> None:
    write_results(tmp_path)
    assert "has not been run yet" in (tmp_path / "README.md").read_text()
    assert read_json(tmp_path / "reproduction.json")["systems"] == {}
