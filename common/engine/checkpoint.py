"""Checkpoints of several engines: whole or absent, the newest sound one found again, old ones rotated away.

A checkpoint is a folder `step_00000012/` with one DeepSpeed checkpoint per engine, the random state of each rank,
`state.json` and a manifest. It is written under a temporary name and renamed when every rank has finished, so that a
folder with the right name is always complete. All ranks must see the same file system.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import deepspeed
import torch

from common.engine.distributed import barrier, on_main_first, rank, world_size
from common.engine.manifest import is_complete, newest_sound, saving, write_manifest
from common.engine.universal import SUFFIX, mend_optimizer, needs_universal, reading_universal
from common.errors import InputError
from common.files import read_json, write_json

_NAME = re.compile(r"step_(\d{8})")


def save_checkpoint(
    folder: str | Path,
    step: int,
    engines: dict[str, deepspeed.DeepSpeedEngine],
    state: dict[str, Any],
    keep: int,
    score: float,
) -> Path:
    """Save `engines` and `state` (JSON values) after `step`; then rotate.

    Kept are the newest `keep` checkpoints and the one with the highest `score`; the others are removed once the new one
    is complete. Raises `SaveFailed` when it cannot be written (a full disk): then all others are as they were.
    """
    folder = Path(folder)
    final = folder / f"step_{step:08d}"
    temporary = folder / f".{final.name}.tmp"
    before = list_checkpoints(folder)
    kept = f"{before[-1]} is untouched: make room, then --resume" if before else "there is none before it"
    with saving(f"checkpoint {final}", kept):
        on_main_first(lambda: _empty_folder(temporary))
        for name, engine in engines.items():
            engine.save_checkpoint(str(temporary), tag=name, save_latest=False, exclude_frozen_parameters=True)
        torch.save(_random_state(), temporary / f"random_rank{rank()}.pt")
        barrier()
        facts = state | {"step": step, "world_size": world_size(), "score": score}
        on_main_first(lambda: write_json(temporary / "state.json", facts))
        write_manifest(temporary)

    def publish() -> None:
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        for old in _superseded(list_checkpoints(folder), keep):
            shutil.rmtree(old)

    on_main_first(publish)
    return final


def newest_checkpoint(folder: str | Path) -> Path | None:
    """The newest undamaged checkpoint under `folder`, None without one. Call on all ranks."""
    return newest_sound(list_checkpoints(folder))


def list_checkpoints(folder: str | Path) -> list[Path]:
    """Complete checkpoints under `folder`, oldest first."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name) and is_complete(path))


def load_checkpoint(path: Path, engines: dict[str, deepspeed.DeepSpeedEngine]) -> dict[str, Any]:
    """Restore `engines` and this rank's random state; returns what was saved as `state`, with its `step`.

    Where another number of ranks wrote it, the universal form is read, and random states stay as they are. Raises
    `InputError`, with the command that converts, when it has no such form.
    """
    state = read_json(path / "state.json")
    universal = needs_universal(path, state["world_size"])
    for name, engine in engines.items():
        tag = name + SUFFIX if universal else name
        with reading_universal(engine, universal):
            loaded, _ = engine.load_checkpoint(str(path), tag=tag, load_module_strict=False)
        if loaded is None:
            raise InputError(f"{path}: holds no checkpoint of {tag}")
        if universal:
            mend_optimizer(engine, path / tag)
    if state["world_size"] == world_size():
        _restore_random_state(torch.load(path / f"random_rank{rank()}.pt", weights_only=True))
    return state


def _superseded(checkpoints: list[Path], keep: int) -> list[Path]:
    """All but the newest `keep` and the best, the latest of equally good ones."""
    best = max(checkpoints, key=lambda path: (read_json(path / "state.json")["score"], path.name))
    return [path for path in checkpoints[:-keep] if path != best]


def _empty_folder(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)
    path.mkdir(parents=True)


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
