"""AOL4PS: a folder with data.csv, query.csv and doc.csv, or with data.tar.gz, query.tar.gz and doc.tar.gz.

The files are tab-separated despite their names, with a header and with quotes where a field holds tabs (CandiList).
A row of data.csv is one query with exactly one click. ClickPos counts from 0, ranks count from 1. The candidates were
made by BM25: a rank is a place in that list, not on AOL's page. SessionNo and DataType are not used: a history spans
sessions, and the splits of this project are by user.
"""

from __future__ import annotations

import csv
import re
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from io import TextIOWrapper
from pathlib import Path
from typing import IO, NamedTuple

from common.data.readers.lines import ReadTally
from common.data.records import Event, MissingId, Record, parse_id, parse_time
from common.errors import InputError

TABLES = ("data", "query", "doc")

_NOT_UTF8 = re.compile("[\udc80-\udcff]")  # what the error handler surrogateescape makes of other bytes


class _Row(NamedTuple):
    ts: float
    query: str
    url: str
    title: str | None
    rank: int


def table_path(folder: Path, name: str) -> Path | None:
    """The file that holds a table: <name>.csv, else <name>.tar.gz, else None."""
    candidates = (folder / f"{name}.csv", folder / f"{name}.tar.gz")
    return next((path for path in candidates if path.is_file()), None)


def read(path: Path, tally: ReadTally) -> Iterator[Record]:
    """One record a user, in the order of their first rows.

    Not streamed: a user's rows need not stand together, so all rows and both tables of texts are held in memory
    (about 1.3 million rows in the full set), without the candidate lists. Raises `InputError` with file and line.
    """
    missing = [f"{name}.csv or {name}.tar.gz" for name in TABLES if table_path(path, name) is None]
    if missing:
        raise InputError(f"{path}: AOL4PS needs a folder with three tables; missing: {', '.join(missing)}")
    query_rows = _read_texts(path, "query", "QueryIndex", ("Query", "QueryIndex"), tally)
    doc_rows = _read_texts(path, "doc", "DocIndex", ("Url", "DocIndex", "Title"), tally)
    queries = {id_: row["Query"] for id_, row in query_rows}
    docs = {id_: (row["Url"], row["Title"]) for id_, row in doc_rows}
    users: dict[str, list[_Row]] = {}
    columns = ("AnonID", "QueryIndex", "QueryTime", "DocIndex", "CandiList", "ClickPos")
    for place, row in _read_table(path, "data", columns, tally):
        try:
            users.setdefault(parse_id(row["AnonID"], "AnonID"), []).append(_parse(row, queries, docs))
        except ValueError as error:
            tally.reject(place, error)
    for user, rows in users.items():
        events = tuple(_events(sorted(rows, key=lambda row: row.ts)))
        yield Record(user_id=f"aol4ps-{user}", events=events, source="aol4ps", group=f"aol4ps-{user}")


def _parse(row: dict[str, str], queries: dict[str, str], docs: dict[str, tuple[str, str]]) -> _Row:
    query = queries.get(row["QueryIndex"])
    if query is None:
        raise ValueError(f"QueryIndex {row['QueryIndex']!r} is not in the query table")
    if not query.strip():
        raise ValueError(f"QueryIndex {row['QueryIndex']!r} has an empty query in the query table")
    if row["DocIndex"] not in docs:
        raise ValueError(f"DocIndex {row['DocIndex']!r} is not in the doc table")
    if not row["ClickPos"].isdigit():
        raise ValueError(f"ClickPos {row['ClickPos']!r} is no number")
    position = int(row["ClickPos"])
    candidates = re.findall(r"d-\d+", row["CandiList"])
    if candidates and candidates[position : position + 1] != [row["DocIndex"]]:
        raise ValueError(f"ClickPos {position} (counted from 0) of CandiList is not the clicked {row['DocIndex']}")
    url, title = docs[row["DocIndex"]]
    return _Row(_parse_time(row["QueryTime"]), query, url, title or None, position + 1)


def _parse_time(text: str) -> float:
    """ISO, or month/day/year as a spreadsheet rewrites it. The zone is not known; both are read as UTC."""
    if "/" not in text:
        return parse_time(text)
    layout = "%m/%d/%Y %H:%M:%S" if text.count(":") == 2 else "%m/%d/%Y %H:%M"
    return datetime.strptime(text, layout).replace(tzinfo=UTC).timestamp()


def _events(rows: list[_Row]) -> Iterator[Event]:
    """A search and its click for each row; rows that repeat the query directly are further clicks of one search."""
    last_query: str | None = None
    for row in rows:
        if row.query != last_query:
            yield Event("search", query=row.query, ts=row.ts)
        last_query = row.query
        yield Event("click", query=row.query, title=row.title, url=row.url, ts=row.ts, rank=row.rank)


def _read_texts(
    folder: Path, name: str, id_column: str, columns: tuple[str, ...], tally: ReadTally
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield `(id, row)` of a table of texts; a row without an id would lend its text to every row without one."""
    for place, row in _read_table(folder, name, columns, tally):
        try:
            yield parse_id(row[id_column], id_column), row
        except MissingId as error:
            tally.reject(place, error)


def _read_table(
    folder: Path, name: str, columns: tuple[str, ...], tally: ReadTally
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield `(file:line, row)` of a table that has at least `columns`."""
    path = table_path(folder, name)
    with _open_table(path, name) as stream:
        reader = csv.reader(stream, delimiter="\t")
        try:
            header = next(reader, [])
            if missing := [column for column in columns if column not in header]:
                raise InputError(f"{path}:1: the header lacks {', '.join(missing)}; expected tab-separated columns")
            for fields in reader:
                place = f"{path}:{reader.line_num}"
                if len(fields) != len(header):
                    tally.reject(place, f"{len(fields)} tab-separated fields, the header has {len(header)}")
                elif _NOT_UTF8.search("\t".join(fields)):
                    tally.reject(place, "not UTF-8")
                else:
                    yield place, dict(zip(header, fields, strict=True))
        except csv.Error as error:
            place = f"{path}:{reader.line_num}"
            raise InputError(f"{place}: not a readable table ({error}); is a quote left open?") from None


@contextmanager
def _open_table(path: Path, name: str) -> Iterator[IO[str]]:
    """The table as text; a byte that is not UTF-8 becomes a lone surrogate, so that its line can be named."""
    text = {"encoding": "utf-8-sig", "errors": "surrogateescape", "newline": ""}
    if path.suffix != ".gz":
        with path.open(**text) as stream:
            yield stream
        return
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                # Read in place, never unpacked: a member's name cannot lead outside.
                if member.isfile() and Path(member.name).name == f"{name}.csv":
                    yield TextIOWrapper(archive.extractfile(member), **text)
                    return
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise InputError(f"{path}: not a whole tar.gz file ({error}); fetch it again") from None
    raise InputError(f"{path}: holds no {name}.csv")
