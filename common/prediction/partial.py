"""What a run has answered so far: a private file beside its output, from which the same command goes on."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from common.access import naming
from common.errors import InputError
from common.files import read_jsonl
from common.private import only_mine

DECIDED_AT_START = ("prompt_date",)


class PartialOutput:
    """The rows of an output that is not whole yet, in `.NAME.partial.jsonl` beside it; open in one process at a time.

    The first line holds `settings` (JSON values). A run that goes on takes those in `DECIDED_AT_START` from there;
    `self.settings` has them. Rows are appended in parts of `part_rows`, the last of `total_rows` may be shorter; each
    part is on the disk before the next begins. A part that a killed run left unfinished is cut off, because what it
    holds depends, to rounding, on all its rows. The file is readable by its owner alone.

    Raises `InputError` when another process writes here, or when the file was begun with other settings.
    """

    def __init__(self, output: str | Path, settings: dict[str, Any], total_rows: int, part_rows: int) -> None:
        self.path = Path(output).with_name(f".{Path(output).name}.partial.jsonl")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.fdopen(only_mine(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND), "a+b")
        try:
            self._lock()
            self.settings = self._begin(json.loads(json.dumps(settings)))
            self.rows = self._keep_parts(total_rows, part_rows)
        except BaseException:
            self._close()
            raise

    def __enter__(self) -> PartialOutput:
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file; one without an answer is removed."""
        if not self.rows:
            self.remove()
        self._close()

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write a part; it is on the disk when this returns."""
        self._write(rows)
        self.rows += len(rows)

    def read(self) -> Iterator[dict[str, Any]]:
        """Stream all rows."""
        return (row for _, row in itertools.islice(read_jsonl(self.path), 1, None))

    def remove(self) -> None:
        """Delete the file."""
        self.path.unlink(missing_ok=True)

    def _close(self) -> None:
        with naming(self.path):  # what a full disk did not take is tried once more
            self._file.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{self.path}: another process is writing here; wait for it, or choose another --output"
            ) from None

    def _begin(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Write the first line of a new file, or check that of an old one, and stand behind it.

        Returns the settings that hold.
        """
        self._file.seek(0)
        first = self._file.readline()
        if not first:
            self._write([{"settings": settings}])
            return settings
        begun = _settings(first)
        if begun is None:
            raise InputError(f"{self.path}: not begun by this command; move it away, or choose another --output")
        compared = (begun.keys() | settings.keys()) - set(DECIDED_AT_START)
        changed = sorted(name for name in compared if begun.get(name) != settings.get(name))
        if changed:
            details = "; ".join(f"{name}: was {begun.get(name)!r}, now {settings.get(name)!r}" for name in changed)
            raise InputError(
                f"{self.path}: holds the answers of a run with other settings ({details}). Give those again to go on "
                "with it, delete the file to begin anew, or choose another --output"
            )
        return settings | {name: begun[name] for name in DECIDED_AT_START if name in begun}

    def _keep_parts(self, total_rows: int, part_rows: int) -> int:
        """Cut off what follows the last complete part; returns how many rows are left."""
        rows = kept = 0
        place = end = self._file.tell()
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            rows, place = rows + 1, place + len(line)
            if rows % part_rows == 0 or rows == total_rows:
                kept, end = rows, place
        self._file.truncate(end)
        return kept

    def _write(self, rows: Sequence[dict[str, Any]]) -> None:
        lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows]
        with naming(self.path):
            self._file.write("".join(lines).encode("utf-8"))
            self._file.flush()
            os.fsync(self._file.fileno())


def _settings(line: bytes) -> dict[str, Any] | None:
    """The settings in a file's first line; None where it holds none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    settings = row.get("settings") if isinstance(row, dict) else None
    return settings if isinstance(settings, dict) else None
