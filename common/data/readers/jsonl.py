"""The generic format: one JSON object a line for each user or session (docs/data_formats.md)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from common.data.readers.lines import ReadTally, read_lines
from common.data.records import Record


def read(path: Path, tally: ReadTally) -> Iterator[Record]:
    """Stream the records of a .jsonl or .jsonl.gz file; empty lines are skipped.

    A record without a `source` gets the file's name. Raises `InputError` with file and line for a bad line.
    """
    source = path.name.removesuffix(".gz").removesuffix(".jsonl")
    for number, line in read_lines(path, tally):
        if not line.strip():
            continue
        try:
            yield _parse(line, source)
        except json.JSONDecodeError as error:
            tally.reject(f"{path}:{number}", f"not valid JSON ({error.msg} at column {error.colno})")
        except (ValueError, OverflowError, RecursionError) as error:
            tally.reject(f"{path}:{number}", error)


def _parse(line: str, source: str) -> Record:
    row = json.loads(line)
    if "\\ud" in line.lower():
        _check_surrogates(row)
    record = Record.from_dict(row, default_source=source)
    _check_order(record)
    return record


def _check_surrogates(row: object) -> None:
    """JSON can spell half a character, which no UTF-8 file can hold."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("a text holds half of a surrogate pair (\\ud800 to \\udfff)") from None


def _check_order(record: Record) -> None:
    """Examples are cut by position, so an event out of order would let the future into a history."""
    newest = float("-inf")
    for place, event in enumerate(record.events):
        if event.ts is not None:
            if event.ts < newest:
                raise ValueError(f"events[{place}] is earlier than an event before it; sort the events by time")
            newest = event.ts
