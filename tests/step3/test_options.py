"""PPO's options in real runs on two ranks: each changes what it says, and nothing before the actor's first update."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from unittest import mock

import pytest

from common.engine.checkpoint import list_checkpoints
from common.pages.samples import read_samples
from common.pages.sections import QUESTIONS
from step3_tppo.monitor import OverOptimisation
from tests.distributed.ranks import run_on_ranks
from tests.step3.runs import command, numbers, run_main, run_successfully

pytestmark = pytest.mark.distributed

# Three epochs over a rollout at a large learning rate: ratios leave the clip range. Recomputed log-probs of an
# unchanged actor are those of the reference to the last bit.
BASE = ("--ppo_epochs", "3", "--target_kl", "0", "--old_logprobs", "recomputed", "--tensorboard", "false")
OPTIONS = {
    "clip_higher": ("--clip_range_high", "2.0"),
    "dual_clip": ("--dual_clip", "1.01", "--clip_range", "0.01"),
    "entropy": ("--entropy_coef", "0.5"),
    "kl_loss_k2": ("--kl_in", "loss", "--kl_estimator", "k2", "--kl_coef", "1"),
    "kl_loss_k3": ("--kl_in", "loss", "--kl_estimator", "k3", "--kl_coef", "1"),
    "kl_reward_k3": ("--kl_estimator", "k3", "--kl_coef", "1"),
}


@pytest.fixture(scope="module")
def base(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    output = tmp_path_factory.mktemp("base") / "run"
    run_successfully(inputs, output, *BASE)
    return numbers(output)


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_changes_the_update_alone(inputs: Path, base: list[dict], tmp_path: Path, name: str) -> None:
    run_successfully(inputs, tmp_path / "run", *BASE, *OPTIONS[name])
    found = numbers(tmp_path / "run")
    # Step 0 warms the critic up, and at step 1 the actor is still the reference: both rollouts are the same.
    rollout = ("response/", "reward/model", "kl/per", "judge/")
    assert {k: v for k, v in found[0].items() if k != "kl/coef"} == {k: v for k, v in base[0].items() if k != "kl/coef"}
    for key in found[1]:
        if key.startswith(rollout):
            assert found[1][key] == base[1][key], key
    assert found[-1]["policy/entropy"] != base[-1]["policy/entropy"]
    assert found[-1]["policy/max_ratio"] < 1e6


def test_several_epochs_leave_ratio_one_behind(base: list[dict]) -> None:
    assert base[0]["policy/max_ratio"] == 0.0  # the critic alone
    assert all(row["policy/max_ratio"] > 1.0 for row in base[1:])
    assert all(row["policy/optimizer_steps"] == 3 for row in base)


def test_adaptive_kl_follows_its_rule(inputs: Path, tmp_path: Path) -> None:
    run_successfully(inputs, tmp_path / "run", "--kl_target", "0.05", "--kl_horizon", "20", "--tensorboard", "false")
    rows = numbers(tmp_path / "run")
    for before, after in pairwise(rows):
        error = min(max(before["kl/per_sequence"] / 0.05 - 1, -0.2), 0.2)
        assert after["kl/coef"] == pytest.approx(before["kl/coef"] * (1 + error * 4 / 20), rel=1e-12)


@pytest.mark.parametrize("mode", ["running", "position"])
def test_reward_normalisation_and_its_resume(inputs: Path, tmp_path: Path, mode: str) -> None:
    flags = ("--reward_norm", mode, "--kl_target", "0.05", "--kl_horizon", "20", "--tensorboard", "false")
    run_successfully(inputs, tmp_path / "straight", *flags)
    run_successfully(inputs, tmp_path / "resumed", *flags, "--lr_schedule", "constant", "--total_steps", "2")
    run_successfully(inputs, tmp_path / "whole", *flags, "--lr_schedule", "constant")
    run_successfully(inputs, tmp_path / "resumed", *flags, "--lr_schedule", "constant", "--resume")
    assert numbers(tmp_path / "resumed") == numbers(tmp_path / "whole")
    profiles = [json.loads(line) for line in (tmp_path / "resumed" / "profiles.jsonl").read_text().splitlines()]
    assert [row["step"] for row in profiles] == [0, 1, 2, 3]
    for row, step in zip(profiles, numbers(tmp_path / "resumed"), strict=True):
        assert len(row["tokens"]) == len(row["reward"]) == 8
        assert sum(row["tokens"]) == pytest.approx(4 * step["response/tokens"])


def test_the_monitor_only_watches(inputs: Path, base: list[dict], tmp_path: Path) -> None:
    run_successfully(inputs, tmp_path / "run", *BASE, "--monitor", "lexical")
    logged = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert {tag for charts in QUESTIONS.values() for chart in charts for tag in chart.curves} <= logged.keys()
    for sample in read_samples(tmp_path / "run" / "samples.jsonl"):
        assert len(sample.verdict.queries) == len(sample.verdict.words) <= len(sample.lines)
    judge = ("judge/relevance_rate", "judge/mean_word_score", "judge/word_gap", "judge/word_calibration_error")
    for row, plain in zip(numbers(tmp_path / "run"), base, strict=True):
        assert {key: value for key, value in row.items() if key not in judge} == plain
        assert 0 <= row["judge/relevance_rate"] <= 1
        assert abs(row["judge/word_gap"]) <= row["judge/word_calibration_error"] + 1e-12


def test_the_monitor_as_the_reward(inputs: Path, base: list[dict], tmp_path: Path) -> None:
    run_successfully(inputs, tmp_path / "run", *BASE, "--monitor", "lexical", "--reward_from", "monitor")
    rows = numbers(tmp_path / "run")
    assert all(row["judge/word_gap"] == row["judge/word_calibration_error"] == 0 for row in rows)
    # The same first samples, judged otherwise.
    assert rows[0]["response/tokens"] == base[0]["response/tokens"]
    assert rows[0]["reward/model_per_token"] != base[0]["reward/model_per_token"]


def _stopped_after_two(rank: int, world_size: int, argv: list[str]) -> tuple[int, str]:
    with mock.patch.object(OverOptimisation, "found", lambda rule: len(rule._history) == 2):
        return run_main(rank, world_size, argv)


def test_over_optimisation_ends_the_run_with_its_model(inputs: Path, tmp_path: Path) -> None:
    argv = command(inputs, tmp_path / "run", "--monitor", "lexical", "--monitor_margin", "0.1", "--save_steps", "50")
    for flags in ((), ("--resume",)):  # taken up again, an ended run stays where it is
        for status, error in run_on_ranks(_stopped_after_two, 2, [*argv[argv.index("step3_tppo/main.py") :], *flags]):
            assert status == 0, error[-3000:]
        assert [row["step"] for row in numbers(tmp_path / "run")] == [0, 1]
        assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step_00000002"]
        assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
