"""Where a command writes: looked at before it works, so that hours are not lost to a folder without rights or room."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import NO_ROOM, InputError

BLOCK_BYTES = 4096  # a full disk may still take an empty file
_RUST = re.compile(r"\(os error (\d+)\)\s*$")


def check_writable(folder: str | Path, remedy: str) -> None:
    """Raise `InputError`, with the remedy, unless a file can be written in `folder`, or in the nearest folder above it
    where it is not there yet.

    A file is written and is gone again: rights alone show no full disk, no quota and no read-only file system.
    """
    path = Path(folder).absolute()
    nearest = next(place for place in (path, *path.parents) if os.path.lexists(place))
    try:
        with tempfile.TemporaryFile(dir=nearest) as probe:
            probe.write(bytes(BLOCK_BYTES))
            probe.flush()
            os.fsync(probe.fileno())  # some file systems look for room only now
    except OSError as error:
        where = "there" if str(folder) == str(nearest) else f"in {nearest}"
        raise InputError(f"{folder}: no file can be written {where} ({error.strerror}); {remedy}") from None


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Give the error of a full disk the path that it lacks: it shows in a write, which knows no name."""
    try:
        yield
    except Exception as error:
        number = system_number(error)
        if number in NO_ROOM and getattr(error, "filename", None) is None:
            raise OSError(number, os.strerror(number), str(path)) from error
        raise


def system_number(error: Exception) -> int | None:
    """The operating system's number for an error (`errno`), None for one that is not the system's.

    Libraries in Rust (safetensors, tokenizers) raise errors of their own, with the number at the text's end.
    """
    if isinstance(error, OSError):
        return error.errno
    found = _RUST.search(str(error))
    return int(found[1]) if found else None


@contextmanager
def scratch_folder(prefix: str) -> Iterator[Path]:
    """A temporary folder, removed at the end: in TMPDIR where that is set, else where the system has its own.

    Raises `InputError` where TMPDIR cannot be used: Python would take another folder, which may be too small.
    """
    given = os.environ.get("TMPDIR")
    if given and not os.path.isdir(given):
        raise InputError(f"TMPDIR is {given}, and there is no such folder; make it, or set TMPDIR to another")
    if given:
        check_writable(given, "set TMPDIR to a folder with room")
    with tempfile.TemporaryDirectory(prefix=prefix, dir=given or None) as folder:
        yield Path(folder)
