"""What a run notes about the machine and its choices."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
from pathlib import Path

import pytest
import torch
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from common.engine import environment as noted
from common.engine.environment import environment, write_environment
from common.engine.trainer_options import TrainerOptions
from common.engine.training_arguments import training_arguments
from common.files import read_json
from step1_sft.config import SftConfig


def test_versions_machine_and_choices_are_read_back_from_the_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU <{index}>")
    write_environment(tmp_path, SftConfig(dtype="fp32", fused_adam=True, lora_r=4, quantize="nf4", zero_stage=2))
    found = read_json(tmp_path / "environment.json")
    for package in ("torch", "deepspeed", "transformers", "peft"):
        assert found["packages"][package] == importlib.metadata.version(package)
    assert (found["gpus_of_first_host"], found["ranks"]) == (["GPU <0>", "GPU <1>"], 1)
    assert found["choices"] == {
        "attn_implementation": "sdpa", "dtype": "fp32", "fused_adam": True, "liger": False, "quantize": "nf4",
        "zero_stage": 2, "offload": "none",
    }  # fmt: skip
    assert found["git_commit"] is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", found["git_commit"])


def test_a_package_or_repository_that_is_not_there_is_null(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(noted, "PACKAGES", ("no-such-package",))
    monkeypatch.setattr(noted, "REPOSITORY", tmp_path)
    found = environment(TrainerOptions())
    assert found["packages"] == {"no-such-package": None} and found["git_commit"] is None
    assert "quantize" not in found["choices"]  # step 2 has no such flag
    monkeypatch.setenv("PATH", str(tmp_path))  # no git either
    assert environment(TrainerOptions())["git_commit"] is None


def test_the_commit_of_another_users_clone_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clone that an administrator made for all; git refuses such a repository by default."""
    described = environment(TrainerOptions())["git_commit"]
    if described is None:
        pytest.skip("no git, or no repository")
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # git's own tests use it
    status = subprocess.run(["git", "-C", str(noted.REPOSITORY), "status"], capture_output=True, text=True, check=False)
    assert "dubious ownership" in status.stderr
    assert environment(TrainerOptions())["git_commit"] == described


@pytest.mark.parametrize("fused", [True, False])
def test_the_flag_reaches_the_trainers_optimiser(tmp_path: Path, fused: bool) -> None:
    args = training_arguments(TrainerOptions(output_dir=str(tmp_path), fused_adam=fused, zero_stage=0))
    unset_hf_deepspeed_config()
    assert args.optim == ("adamw_torch_fused" if fused else "adamw_torch")
