"""What a checkpoint folder holds, by size and hash, so that a half or damaged one is never resumed from.

The manifest is the last file to be written: a folder without one is not complete. All ranks hash a share of the files,
which must lie on a file system that all of them see.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.access import system_number
from common.engine.distributed import barrier, gather_from_ranks, on_main_first, rank, world_size
from common.errors import InputError, SaveFailed, lost_peer, one_line
from common.files import read_json, write_json
from common.progress import phase_progress

MANIFEST = "manifest.json"
DAMAGED = ".damaged_"


@contextmanager
def saving(what: str, kept: str) -> Iterator[None]:
    """Raise `SaveFailed` where `what` cannot be written; `kept` says what is there all the same."""
    try:
        yield
    except Exception as error:
        # torch raises a RuntimeError for a file that it cannot finish.
        if lost_peer(error) or not (isinstance(error, RuntimeError) or system_number(error)):
            raise
        raise SaveFailed(f"{what} could not be written ({one_line(error)}); is the disk full? {kept}") from error


def write_manifest(folder: Path, **facts: int) -> None:
    """List all files of `folder` in its manifest, once they are on disk. Call on all ranks, after all have written.

    `facts` are numbers to keep beside the list: what a run must know before it reads the files.
    """
    barrier()
    found = {name: _describe(folder / name) for name in _share(_names(folder))}
    files = {name: description for part in gather_from_ranks(found) for name, description in part.items()}
    on_main_first(lambda: write_json(folder / MANIFEST, {"facts": facts, "files": dict(sorted(files.items()))}))


def read_facts(folder: Path) -> dict[str, int]:
    """The numbers that `write_manifest` kept for a complete folder."""
    return read_json(folder / MANIFEST)["facts"]


def is_complete(folder: Path) -> bool:
    """Whether `folder` was written to its end; what is in it may have been damaged since."""
    return (folder / MANIFEST).is_file()


def damage(folder: Path) -> list[str]:
    """What is wrong with a complete folder, nothing for a sound one: the same list on all ranks. Call on all."""
    try:
        listed = read_json(folder / MANIFEST)["files"]
        # Large files are read whole, which can take minutes before anything else of a run shows.
        names = phase_progress(_share(sorted(listed)), desc=f"checking {folder.name}", unit="file")
        problems = [problem for name in names if (problem := _problem(folder / name, listed[name]))]
    except (InputError, TypeError, KeyError) as error:
        problems = [f"{folder / MANIFEST}: not readable ({error})"]
    return sorted({problem for part in gather_from_ranks(problems) for problem in part})


def newest_sound(folders: Sequence[Path]) -> Path | None:
    """The last of `folders` (complete ones, oldest first) that is undamaged; None without one. Call on all ranks.

    A damaged one is named, with what is wrong, and set aside under a name that no run looks for.
    """
    for folder in reversed(folders):
        problems = damage(folder)
        if not problems:
            return folder
        on_main_first(lambda folder=folder, problems=problems: _set_aside(folder, problems))
    return None


def _set_aside(folder: Path, problems: Sequence[str]) -> None:
    aside, number = folder.with_name(f"{DAMAGED}{folder.name}"), 0
    while aside.exists():
        number += 1
        aside = folder.with_name(f"{DAMAGED}{folder.name}_{number}")
    folder.rename(aside)
    print(
        f"warning: checkpoint {folder} is damaged ({'; '.join(problems[:3])}); "
        f"set aside as {aside.name}, the one before it is tried",
        flush=True,
    )


def _names(folder: Path) -> list[str]:
    return sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST
    )


def _share(names: Sequence[str]) -> Sequence[str]:
    return names[rank() :: world_size()]


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
        return {"size": os.fstat(stream.fileno()).st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _problem(path: Path, listed: dict[str, Any]) -> str:
    if not path.is_file():
        return f"{path.name} is missing"
    if path.stat().st_size != listed["size"]:
        return f"{path.name} has {path.stat().st_size} bytes, not {listed['size']}"
    return "" if _describe(path)["sha256"] == listed["sha256"] else f"{path.name} has other content"
