"""What a run ran on and which kernels it chose, kept once in its folder, so that a report can say so."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from common.engine import distributed
from common.files import write_json

ENVIRONMENT_NAME = "environment.json"
PACKAGES = (
    "torch", "deepspeed", "transformers", "peft", "accelerate", "flash-attn", "bitsandbytes", "liger-kernel", "triton"
)
CHOICES = ("attn_implementation", "dtype", "fused_adam", "liger", "quantize", "zero_stage", "offload")
REPOSITORY = Path(__file__).resolve().parents[2]


def write_environment(output_dir: str | Path, options: object) -> None:
    """Write `environment.json` into the folder of the run that `options` describe. Call on one process.

    A run that is resumed elsewhere says where it went on.
    """
    write_json(Path(output_dir) / ENVIRONMENT_NAME, environment(options))


def environment(options: object) -> dict[str, Any]:
    """Versions (None: not installed), machine, commit (None: no git), and what `options` choose, as JSON values.

    No package is imported for it.
    """
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "packages": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "system": platform.platform(),
        "cuda": torch.version.cuda,
        "gpus_of_first_host": gpus,
        "ranks": distributed.world_size(),
        "git_commit": _commit(),
        "choices": {name: getattr(options, name) for name in CHOICES if hasattr(options, name)},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit that is checked out, with `-dirty` where files differ from it; None without git or a repository."""
    # git refuses a repository of another user's, such as a clone that an administrator made for all. This one's code is
    # running already, so it is trusted.
    trusted = ["-c", f"safe.directory={REPOSITORY}"]
    command = ["git", *trusted, "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
