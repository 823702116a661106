"""The measurements for one GPU, on tiny models without one: what is written, compared, and ended in time."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.machine import other_than_pinned
from benchmarks.gpu.mismatch import distance
from benchmarks.gpu.pipeline import distances_of
from benchmarks.gpu.pretrained import ended

ROOT = Path(__file__).resolve().parents[2]


def test_every_part_leaves_its_result_though_one_before_it_fails(tmp_path: Path) -> None:
    """A folder that holds no model makes the first part fail; the others measure, and the status tells."""
    empty, output = tmp_path / "model", tmp_path / "results"
    empty.mkdir()
    command = ["bash", "benchmarks/gpu/run.sh", "--small", "--output", str(output), "--model", str(empty)]
    ran = subprocess.run(
        [*command, "--parts", "pretrained decoding mismatch"], cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"TPPO_VENV": "none", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert "pretrained failed with exit status 1; the end of" in ran.stdout
    *_, pretrained, decoding, mismatch = (line.split() for line in ran.stdout.splitlines())
    assert pretrained[:3] == ["pretrained", "failed", "(1)"]
    assert decoding[:2] == ["decoding", "ok"] and mismatch[:2] == ["mismatch", "ok"]
    found = {name: json.loads((output / f"{name}.json").read_text()) for name in ("decoding", "mismatch")}
    assert [row["rows"] for row in found["decoding"]["rows"]] == [1, 2, 1, 2]
    assert 0 < found["decoding"]["best_share"] < 1
    # fp32 here: two ways through the same model differ by rounding alone, and do differ.
    assert 0 < found["mismatch"]["decoding_from_padded"]["max"] < 1e-5
    assert found["mismatch"]["same_tokens_with_graphs"] == 1


def test_the_limit_of_a_run_is_above_0(tmp_path: Path) -> None:
    command = ["bash", "benchmarks/gpu/run.sh", "--output", str(tmp_path), "--minutes", "0", "--parts", "decoding"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 2 and "--minutes is a whole number above 0, not '0'" in ran.stderr


def test_distances_of_two_machines_by_hand() -> None:
    numbers = {
        "sft_dev_loss": {"bf16": 2.02, "fp32": 2.0, "in_training": 1.98, "trained_on_cpu": 2.2},
        "word_auc": {"bf16": 0.81, "fp32": 0.8, "in_training": 0.77},
        "tppo_dev_loss": {"bf16": 3.0, "fp32": 4.0},
        "rollout_mismatch": {"mean": 0.01, "max": 0.5},
    }
    assert distances_of(numbers) == pytest.approx({
        "sft_dev_loss_relative": 0.01, "sft_dev_loss_in_training_relative": 0.01, "sft_trained_on_cpu_relative": 0.1,
        "word_auc": 0.01, "word_auc_in_training": 0.03, "tppo_dev_loss_relative": 0.25, "rollout_mismatch_mean": 0.01,
    })  # fmt: skip


def test_distances_leave_padding_out() -> None:
    mask = torch.tensor([[True, True], [True, False]])
    found = distance(torch.tensor([[1.0, 2.0], [3.0, 9.0]]), torch.tensor([[1.0, 2.5], [2.0, 0.0]]), mask)
    assert found == {"mean": 0.5, "max": 1.0}


def test_a_run_is_killed_with_its_children_when_its_time_is_over(tmp_path: Path) -> None:
    """The child outlives a shell that is killed alone."""
    file = tmp_path / "alive"
    command = ["bash", "-c", f"(sleep 3; touch {file}) & wait"]
    process = subprocess.Popen(command, start_new_session=True)
    assert ended(process, time.monotonic() + 0.5) == -9
    time.sleep(3.5)
    assert not file.exists()


def test_packages_are_held_against_their_pins(monkeypatch: pytest.MonkeyPatch) -> None:
    pin = re.search(r"^torch==(\S+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE)[1]
    versions = {"torch": f"{pin}+cu130", "transformers": "5.17.0"}
    monkeypatch.setattr("benchmarks.gpu.machine.installed_version", lambda name: versions.get(name, "missing"))
    found = other_than_pinned()
    assert "torch" not in found
    assert found["transformers"].startswith("5.17.0, pinned ")
    assert found["deepspeed"].startswith("missing, pinned ")
