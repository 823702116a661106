"""AmazonQAC (amazon/AmazonQAC on the Hugging Face hub): parquet files of Amazon searches, without clicks.

A row of a train file is one search; the rows of a session are gathered by `session_id` and sorted by `search_time`. A
row of a test file is a whole history: `past_search_terms` (term and time) and the final search. Which of the two a
file is, its columns tell. What was typed on the way (the prefixes) is not read.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from common.data.readers.grouping import group_rows
from common.data.readers.lines import ReadTally
from common.data.records import Event, Record, parse_id, parse_time
from common.errors import InputError, one_line

TRAIN_COLUMNS = ["session_id", "final_search_term", "search_time"]
TEST_COLUMNS = [*TRAIN_COLUMNS, "past_search_terms"]


def read(path: Path, tally: ReadTally) -> Iterator[Record]:
    """One record a session (train files) or a row (test files), from a file or all *.parquet files of a folder.

    Test files are streamed. Train rows of one session may stand anywhere, in any file, so they are first spread over
    temporary files by session (see `group_rows`): memory is bounded, and TMPDIR needs about 70 bytes a search.
    Raises `InputError` with file and row for a bad row.
    """
    paths = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not paths:
        raise InputError(f"{path}: no *.parquet file in this folder")
    files = [_open(file) for file in paths]
    for file, table in zip(paths, files, strict=True):
        if _is_test(table):
            yield from _read_test(file, table, tally)
    train = [(file, table) for file, table in zip(paths, files, strict=True) if not _is_test(table)]
    rows = (row for file, table in train for row in _read_train(file, table, tally))
    for session, searches in group_rows(rows, sum(table.metadata.num_rows for _, table in train)):
        yield _record(session, [(term, ts) for _, term, ts in searches])


def _open(path: Path) -> pyarrow.parquet.ParquetFile:
    try:
        table = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable parquet file ({one_line(error)})") from None
    if missing := [column for column in TRAIN_COLUMNS if column not in table.schema_arrow.names]:
        raise InputError(f"{path}: lacks the columns {', '.join(missing)} of AmazonQAC")
    return table


def _is_test(table: pyarrow.parquet.ParquetFile) -> bool:
    return "past_search_terms" in table.schema_arrow.names


def _rows(
    path: Path, table: pyarrow.parquet.ParquetFile, columns: list[str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    try:
        for batch in table.iter_batches(batch_size=16_384, columns=columns):
            for number, row in enumerate(batch.to_pylist(), start=number + 1):  # noqa: B020 - counts on over batches
                yield number, row
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # OverflowError: a year past 9999
        raise InputError(
            f"{path}:{number + 1}: the parquet file breaks after row {number} ({one_line(error)})"
        ) from None


def _read_train(
    path: Path, table: pyarrow.parquet.ParquetFile, tally: ReadTally
) -> Iterator[tuple[str, str, float]]:
    for number, row in _rows(path, table, TRAIN_COLUMNS):
        try:
            yield (parse_id(row["session_id"], "session_id"), *_search(row["final_search_term"], row["search_time"]))
        except ValueError as error:
            tally.reject(f"{path}:{number}", error, f"row {number}: ")


def _read_test(path: Path, table: pyarrow.parquet.ParquetFile, tally: ReadTally) -> Iterator[Record]:
    for number, row in _rows(path, table, TEST_COLUMNS):
        try:
            past = [_search(*_pair(item)) for item in row["past_search_terms"] or []]
            last = _search(row["final_search_term"], row["search_time"])
            yield _record(parse_id(row["session_id"], "session_id"), [*past, last])
        except ValueError as error:
            tally.reject(f"{path}:{number}", error, f"row {number}: ")


def _record(session: str, searches: list[tuple[str, float]]) -> Record:
    events = tuple(Event("search", query=term, ts=ts) for term, ts in sorted(searches, key=lambda search: search[1]))
    name = f"amazonqac-{session}"
    return Record(user_id=name, events=events, source="amazonqac", group=name)


def _pair(item: Any) -> tuple[Any, Any]:
    if not isinstance(item, list) or len(item) != 2:
        raise ValueError(f"past_search_terms must hold [term, time] pairs, found {item!r}")
    return item[0], item[1]


def _search(term: Any, time: Any) -> tuple[str, float]:
    if not isinstance(term, str) or not term.strip():
        raise ValueError(f"search term {term!r} is no text")
    ts = parse_time(time.isoformat() if isinstance(time, datetime) else time)
    if ts is None:
        raise ValueError("a search has no time")
    return term, ts
