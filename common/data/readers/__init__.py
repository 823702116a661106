"""Search logs as records: one module a format, and `read_log`, which picks one by the file's name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from common.data.readers import amazonqac, aol, aol4ps, jsonl, trec
from common.data.readers.lines import ReadTally
from common.data.records import Record
from common.errors import InputError

AUTO = "auto"

READERS: dict[str, Callable[[Path, ReadTally], Iterator[Record]]] = {
    "jsonl": jsonl.read,
    "aol": aol.read,
    "aol4ps": aol4ps.read,
    "trec": trec.read,
    "amazonqac": amazonqac.read,
}

_FILE_NAMES = {
    "jsonl": re.compile(r".*\.jsonl(\.gz)?"),
    "aol": aol.FILE_NAME,
    "trec": re.compile(r".*\.xml(\.gz)?"),
    "amazonqac": re.compile(r".*\.parquet"),
}

_KNOWN_NAMES = (
    "*.jsonl[.gz] (jsonl), user-ct-test-collection-*.txt[.gz] or a folder of them (aol), a folder with data, query and "
    "doc as .csv or .tar.gz (aol4ps), *.xml[.gz] (trec), *.parquet or a folder of them (amazonqac)"
)


def detect_format(path: str | Path, log_format: str = AUTO) -> str:
    """The format to read `path` in: `log_format`, or for `auto` what the name says; the content is never looked at.

    Raises `InputError` for a path that does not exist and for a name that says nothing.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such log; check --log")
    if log_format in READERS:
        return log_format
    if log_format != AUTO:
        raise InputError(f"log format {log_format!r} is none of {AUTO}, {', '.join(READERS)}")
    if path.is_dir():
        found = _folder_format(path)
    else:
        found = next((name for name, pattern in _FILE_NAMES.items() if pattern.fullmatch(path.name)), None)
    if found is None:
        raise InputError(f"{path}: its name tells no format. Known: {_KNOWN_NAMES}; or give --log_format")
    return found


def read_log(
    path: str | Path, log_format: str = AUTO, max_bad_lines: int = 0, counter: Counter[str] | None = None
) -> Iterator[Record]:
    """Stream the records of a log, in the format that `detect_format` tells.

    Up to `max_bad_lines` lines that cannot be read are skipped; `counter` receives their number under `bad_lines` and
    what else the format's reader counts. Raises `InputError`, with file and line, for one bad line more, and for a log
    without any record.
    """
    chosen = detect_format(path, log_format)
    return _read(Path(path), READERS[chosen], chosen, ReadTally(max_bad_lines, counter))


def _read(
    path: Path, reader: Callable[[Path, ReadTally], Iterator[Record]], log_format: str, tally: ReadTally
) -> Iterator[Record]:
    empty = True
    for record in reader(path, tally):
        empty = False
        yield record
    if empty:
        skipped = tally.counts["bad_lines"]
        raise InputError(f"{path}: holds no record (read as {log_format}, {skipped} bad lines skipped)")


def _folder_format(folder: Path) -> str | None:
    if all(aol4ps.table_path(folder, name) for name in aol4ps.TABLES):
        return "aol4ps"
    if any(aol.FILE_NAME.fullmatch(file.name) for file in folder.iterdir()):
        return "aol"
    return "amazonqac" if any(folder.glob("*.parquet")) else None
