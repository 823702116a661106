"""What ends a run and what is only said, by tables; and a whole run whose reward model is constant."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import TrainingDiverged
from step3_tppo.guards import RolloutGuard
from tests.step3.runs import command, environment, numbers, run

GOOD = {
    "kl/per_sequence": 2.0, "response/eos_rate": 0.5, "response/words_per_query": 3.0, "reward/word_score_std": 0.4,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"response/eos_rate": 0.0}, "no response has ended in the rollout of step 7: raise --max_response_tokens"),
        ({"response/eos_rate": 0.01}, None),
        ({"response/words_per_query": 0.0}, "no response holds a word in the rollout of step 7"),
        ({"reward/word_score_std": 0.0}, "the reward model gives every word the same score in the rollout of step 7"),
        ({"reward/word_score_std": 2e-4}, None),
        ({"kl/per_sequence": 100.0}, None),
    ],
)
def test_what_a_rollout_shows(change: dict[str, float], message: str | None) -> None:
    found = RolloutGuard(max_kl=100.0).check(7, {**GOOD, **change})
    assert len(found) == (message is not None)
    assert message is None or found[0].startswith(message)


def test_a_warning_is_said_once_until_it_has_passed() -> None:
    guard, bad = RolloutGuard(100.0), {**GOOD, "response/eos_rate": 0.0}
    said = [len(guard.check(step, scalars)) for step, scalars in enumerate([bad, bad, GOOD, bad, bad])]
    assert said == [1, 0, 0, 1, 0]


def test_an_exploding_kl_ends_the_run() -> None:
    with pytest.raises(TrainingDiverged, match=r"100\.1 nats a response at step 3, above --max_kl 100"):
        RolloutGuard(100.0).check(3, {**GOOD, "kl/per_sequence": 100.1})
    assert RolloutGuard(0.0).check(3, {**GOOD, "kl/per_sequence": 1e6}) == []


@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_all_ranks_end_together_when_the_kl_explodes(inputs: Path, tmp_path: Path) -> None:
    ended = run(inputs, tmp_path / "run", "--max_kl", "1e-4", "--save_steps", "1")
    assert [status for status, _ in ended] == [3, 3]
    assert all("above --max_kl 0.0001; the last checkpoint is kept" in error for _, error in ended)
    # The actor is the reference, but for rounding, until its warm-up is over. That step is saved, the one that diverged
    # is not.
    steps = [row["step"] for row in numbers(tmp_path / "run")]
    saved = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert saved[-1] == f"step_{steps[-1]:08d}" and len(steps) >= 2


@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_a_constant_reward_model_is_said_aloud(inputs: Path, tmp_path: Path) -> None:
    """A head of zeros: each class as likely as the others, whatever the word."""
    constant = tmp_path / "reward"
    shutil.copytree(inputs / "reward", constant)
    weights = load_file(constant / "model.safetensors")
    for name in [name for name in weights if name.startswith("score.")]:
        weights[name] = torch.zeros_like(weights[name])
    save_file(weights, constant / "model.safetensors", metadata={"format": "pt"})
    launch = command(inputs, tmp_path / "run", "--reward_path", str(constant), "--total_steps", "2")
    ended = subprocess.run(launch, env=environment(), capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stderr[-2000:]
    said = ended.stdout + ended.stderr
    assert said.count("warning: the reward model gives every word the same score in the rollout of step 0") == 1
    assert [row["reward/word_score_std"] for row in numbers(tmp_path / "run")] == [pytest.approx(0, abs=1e-6)] * 2
