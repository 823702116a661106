"""What a run reads, as digests of the files' content: a resumed run refuses inputs that have changed under it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from common.errors import InputError

# Settings that are files, folders, hub names or the name of something built in; see `input_digests`.
Inputs = Mapping[str, str | Path | Sequence[str | Path]]

WHOLE_BYTES = 256 * 2**20  # a larger file is sampled: 256 blocks of a MiB, at even distances
BLOCK_BYTES = 2**20
MODELS = ("model_name_or_path", "actor_path", "reward_path", "critic_path")
READ_BY_STEPS = (*MODELS, "samples", "labels", "prompt_template", "truth", "deepspeed_config")
# What a model folder's content depends on; others may lie there too (a README, an evaluation).
MODEL_SUFFIXES = frozenset({".safetensors", ".bin", ".json", ".jinja", ".model", ".txt"})


def input_digests(inputs: Inputs) -> dict[str, str]:
    """The digest of each file that the `inputs` name, by flag and file name; of files of one name all of them together.

    Of a folder, those of a model count (`MODEL_SUFFIXES`), without its subfolders. A model on the hub has the commit in
    the local cache. What is neither, the name of a template, has no digest.
    """
    found: dict[str, list[str]] = {}
    for flag, given in inputs.items():
        if flag in MODELS and (commit := hub_commit(str(given))):
            found[f"--{flag} {given}"] = [f"commit {commit}"]
        for path in _files([given] if isinstance(given, str | Path) else given):
            found.setdefault(f"--{flag} {path.name}", []).append(content_digest(path))
    return {name: " ".join(digests) for name, digests in found.items()}


def check_readable(*paths: str) -> None:
    """Raise `InputError` for a file, or a model folder's file, that this user may not read. Names of the hub pass."""
    for file in _files(paths):
        try:
            file.open("rb").close()
        except PermissionError:
            raise InputError(f"{file}: you may not read it; its owner can allow it with chmod a+r") from None


def hub_commit(name: str) -> str | None:
    """The commit of a hub model in the local cache; None where `name` is a folder or was never downloaded."""
    if not name or Path(name).exists():
        return None
    try:
        file = try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # no name that the hub could know
        return None
    return Path(file).parent.name if isinstance(file, str) else None


def log_files(paths: Sequence[str]) -> list[Path]:
    """The files of search logs: a log may be a folder, of files of any kind."""
    logs = map(Path, paths)
    return [file for log in logs for file in (sorted(filter(Path.is_file, log.iterdir())) if log.is_dir() else [log])]


def step_inputs(config: Any, splits: Sequence[str] = ("train", "dev")) -> Inputs:
    """What a step with these settings reads: models, files, and the `splits` of its examples."""
    inputs = {flag: getattr(config, flag) for flag in READ_BY_STEPS if hasattr(config, flag)}
    if hasattr(config, "data_dir"):
        inputs["data_dir"] = [Path(config.data_dir) / f"{split}.jsonl" for split in splits]
    return inputs


def content_digest(path: str | Path) -> str:
    """SHA-256 of a file's size and content, of samples of it where it is larger than `WHOLE_BYTES`."""
    size = os.path.getsize(path)
    hasher = hashlib.sha256(str(size).encode())
    with open(path, "rb") as stream:
        for start in _block_starts(size):
            stream.seek(start)
            hasher.update(stream.read(BLOCK_BYTES))
    return hasher.hexdigest()


def _block_starts(size: int) -> Sequence[int]:
    if size <= WHOLE_BYTES:
        return range(0, size, BLOCK_BYTES)
    count = WHOLE_BYTES // BLOCK_BYTES
    return [number * (size - BLOCK_BYTES) // (count - 1) for number in range(count)]


def _files(given: Sequence[str | Path]) -> Iterator[Path]:
    for path in map(Path, filter(None, given)):
        if path.is_file():
            yield path
        elif path.is_dir():
            yield from sorted(file for file in path.iterdir() if file.is_file() and file.suffix in MODEL_SUFFIXES)
