"""Files that are whole or absent: atomic writes, JSON lines, and folders that belong to one run.

What quotes users (examples, samples, responses, labels, reports) is readable by its owner alone; models and settings
take the umask, so that they can be shared.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

from common.access import check_writable, naming
from common.errors import RUN_CONFIG_NAME, InputError
from common.inputs import Inputs, input_digests
from common.private import only_mine

INPUT_DIGESTS = "input_digests"  # key of a run's settings file


@contextmanager
def atomic_write(path: str | Path, private: bool = False) -> Iterator[IO[str]]:
    """Open a text file that appears under `path` only once it is complete (temporary name, fsync, rename).

    `private`: others may not read it, whatever the umask and whatever was there before.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path), open(temporary, "w", encoding="utf-8", opener=only_mine if private else None) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any, private: bool = False) -> None:
    """Write `value` as indented JSON, atomically; see `atomic_write`. NaN is refused: JSON has none."""
    with atomic_write(path, private) as stream:
        json.dump(value, stream, indent=2, ensure_ascii=False, allow_nan=False)
        stream.write("\n")


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, without the byte order mark that some editors write at its start.

    Raises `InputError` for a file that is missing, cannot be read or has another encoding.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8; save the file in that encoding") from None


def read_json(path: str | Path) -> Any:
    """Read a JSON file; raises `InputError` as `read_text` does, and when it is not JSON."""
    try:
        return json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None


def write_jsonl(path: str | Path, rows: Iterable[dict]) -> int:
    """Write one JSON object a line, atomically, for its owner alone; returns how many."""
    count = 0
    with atomic_write(path, private=True) as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
            count += 1
    return count


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict]]:
    """Yield `(line number, object)` for each non-empty line of a file that this project wrote.

    An editor may have put a byte order mark at its start; it is dropped.

    Raises `InputError` with file and line number for a missing file or a line that is no JSON object.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError:
                raise InputError(f"{path}:{number}: not UTF-8; save the file in that encoding") from None
            except (json.JSONDecodeError, RecursionError) as error:
                raise InputError(f"{path}:{number}: not valid JSON ({error})") from None
            if not isinstance(row, dict):
                raise InputError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
            yield number, row


def mend_last_line(path: str | Path, row_start: bytes) -> None:
    """Make `path`, a file of JSON lines that each begin with `row_start`, or none yet, end with a complete line.

    A last line without its line break was being written when a run was killed: half of a row is cut off, a whole one
    gets its line break. Raises `InputError`, and leaves the file alone, if the line is no part of such a row.
    Nobody but its owner may read the file afterwards.
    """
    path = Path(path)
    with open(path, "ab+", opener=only_mine) as stream:
        line = _after_last_break(stream)
        if line[: len(row_start)] != row_start[: len(line)]:
            raise InputError(f"{path}: the last line is none of this project's rows; choose another file")
        if _is_json(line):
            stream.write(b"\n")
        elif line:
            stream.truncate(stream.seek(-len(line), os.SEEK_END))
            print(f"{path}: cut off a half-written last line")


def _after_last_break(stream: IO[bytes]) -> bytes:
    """What follows the last line break; the stream stands at its end afterwards."""
    start = stream.seek(0, os.SEEK_END)
    line = b""
    while start and b"\n" not in line:
        length = min(start, 1 << 16)
        start = stream.seek(start - length)
        line = stream.read(length) + line
    stream.seek(0, os.SEEK_END)
    return line.rpartition(b"\n")[2]


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def digest(*parts: str) -> str:
    """Sixteen hexadecimal digits that identify a sequence of texts (SHA-256, length-prefixed parts)."""
    hasher = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", errors="surrogatepass")
        hasher.update(f"{len(data)}:".encode())
        hasher.update(data)
    return hasher.hexdigest()[:16]


def lock(file: int | IO[Any], path: str | Path, remedy: str) -> None:
    """Keep other processes from `path`, which is open as `file`, until this one closes it or ends.

    Raises `InputError`, with the remedy, where another process holds it. A file system without locks is told of.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{path}: another process is writing here; wait for it, or {remedy}") from None
    except OSError as error:
        print(f"note: {path} cannot be locked ({error.strerror}): start no second command that writes here")


def claim_output_dir(
    path: str | Path, config: dict, *, resume: bool, overwrite: bool, may_differ: frozenset[str] = frozenset(),
    inputs: Inputs = MappingProxyType({}),
) -> Path:
    """Make `path` the folder of the run described by `config` (JSON values only).

    A folder that holds something is refused unless `resume` (then the settings must be those it was begun
    with, `may_differ` aside, and so must the content of the `inputs`) or `overwrite` (then a folder of an earlier run
    is removed; any other is refused).
    Call it on one process only, before any work. Raises `InputError`, also where nothing can be written.
    """
    path = Path(path)
    marker = path / RUN_CONFIG_NAME
    occupied = path.exists() and any(path.iterdir())
    if resume and overwrite:
        raise InputError("--resume and --overwrite contradict each other: give one of them")
    if occupied and not marker.is_file():
        raise InputError(f"{path}: not empty and not the output of a run (no {RUN_CONFIG_NAME}); choose another folder")
    check_writable(path, "choose another output folder")
    if occupied and overwrite:
        empty_folder(path)
    elif occupied and resume:
        _check_same_run(marker, config, may_differ, input_digests(inputs))
        return path
    elif occupied:
        raise InputError(
            f"{path}: holds another run. Add --resume to go on with it, --overwrite to replace it, "
            "or choose another output folder"
        )
    path.mkdir(parents=True, exist_ok=True)
    write_json(marker, config | ({INPUT_DIGESTS: input_digests(inputs)} if inputs else {}))
    return path


def empty_folder(path: str | Path) -> None:
    """Delete what is in a folder; the folder stays, and so does a link to it on another disk."""
    for child in Path(path).iterdir():
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()


def _check_same_run(marker: Path, config: dict, may_differ: frozenset[str], digests: dict[str, str]) -> None:
    begun = read_json(marker)
    read = begun.pop(INPUT_DIGESTS, digests)  # runs of earlier versions have noted none
    wanted = json.loads(json.dumps(config))
    if changed := [key for key in _changed(begun, wanted) if key not in may_differ]:
        details = "; ".join(f"{key}: was {begun.get(key)!r}, now {wanted.get(key)!r}" for key in changed)
        raise InputError(f"{marker.parent}: --resume needs the settings the run was begun with, but {details}")
    if changed := _changed(read, digests):
        raise InputError(
            f"{marker.parent}: --resume needs the inputs the run was begun with, but these have changed since: "
            f"{', '.join(changed)}. Put them back, or begin anew with --overwrite or another output folder"
        )


def _changed(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
