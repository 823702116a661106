"""The AOL search log of 2006, raw: `user-ct-test-collection-01.txt` to `-10.txt`, plain or gzip.

Tab-separated columns AnonID, Query, QueryTime, ItemRank, ClickURL; no quoting, so "null" and a lone quote are text.
One row is a search without a click, or one click; further clicks and further result pages repeat the query. So a run
of equal queries is one search at its first time, with the clicks of all its rows. The URL is a domain, titles do not
exist, and a click has no time but that of its row. The zone of the times is not known; they are read as UTC.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterable, Iterator
from itertools import groupby, pairwise
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from common.data.readers.lines import ReadTally, read_lines
from common.data.records import Event, MissingId, Record, is_missing_id, parse_time
from common.errors import InputError

FILE_NAME = re.compile(r"user-ct-test-collection-.*\.txt(\.gz)?")
COLUMNS = ("AnonID", "Query", "QueryTime", "ItemRank", "ClickURL")


class _Row(NamedTuple):
    user: int
    ts: float
    query: str
    rank: int | None
    url: str | None


def read(path: Path, tally: ReadTally) -> Iterator[Record]:
    """Stream one record a user, in order of AnonID, from a file or from all files of a folder at once.

    The files are merged by user, so a user may stand in several; only one user is held in memory. Counts
    `next_page_rows` and `empty_query_rows`. Raises `InputError` for a bad line or a file that is not sorted by AnonID.
    """
    files = log_files(path) if path.is_dir() else [path]
    merged = heapq.merge(*(_read_rows(file, tally) for file in files), key=attrgetter("user"))
    for user, rows in groupby(merged, key=attrgetter("user")):
        events = tuple(_events(sorted(rows, key=attrgetter("ts")), tally))
        yield Record(user_id=f"aol-{user}", events=events, source="aol", group=f"aol-{user}")


def log_files(folder: Path) -> list[Path]:
    """The log's files in a folder, sorted; raises `InputError` for none, or for one that is there plain and as gzip."""
    files = sorted(file for file in folder.iterdir() if FILE_NAME.fullmatch(file.name))
    if not files:
        raise InputError(f"{folder}: no file named user-ct-test-collection-*.txt[.gz] in this folder")
    for plain, packed in pairwise(files):
        if packed.name == f"{plain.name}.gz":
            raise InputError(f"{packed}: is there as {plain.name} as well; its rows would count twice, remove one")
    return files


def _read_rows(path: Path, tally: ReadTally) -> Iterator[_Row]:
    last_user = -1
    for number, line in read_lines(path, tally):
        fields = line.split("\t")
        if not line or fields[0] == COLUMNS[0]:
            continue
        try:
            row = _parse(fields)
        except ValueError as error:
            tally.reject(f"{path}:{number}", error)
            continue
        if row.user < last_user:
            raise InputError(
                f"{path}:{number}: AnonID {row.user} after {last_user}; the file must be sorted by AnonID, "
                "e.g. with sort -s -t$'\\t' -k1,1n"
            )
        last_user = row.user
        yield row


def _parse(fields: list[str]) -> _Row:
    if not 3 <= len(fields) <= len(COLUMNS):
        raise ValueError(f"{len(fields)} tab-separated fields; AOL has {len(COLUMNS)}: {', '.join(COLUMNS)}")
    # Some copies have lost the trailing tabs of rows without a click.
    user, query, time, rank, url = fields + [""] * (len(COLUMNS) - len(fields))
    if is_missing_id(user):
        raise MissingId(f"AnonID is missing, found {user!r}")
    if not (user.isascii() and user.isdigit()):
        raise ValueError(f"AnonID {user!r} is no number")
    if rank and not (rank.isascii() and rank.isdigit()):
        raise ValueError(f"ItemRank {rank!r} is no number")
    return _Row(int(user), parse_time(time), query, int(rank) if rank else None, url or None)


def _events(rows: Iterable[_Row], tally: ReadTally) -> Iterator[Event]:
    """Searches and clicks of one user's rows, which are in time order."""
    for query, run in groupby(rows, key=attrgetter("query")):
        if not query.strip():
            tally.counts["empty_query_rows"] += sum(1 for _ in run)
            continue
        page_time: float | None = None
        for row in run:
            if page_time is None:
                yield Event("search", query=query, ts=row.ts)
            elif row.ts > page_time:
                tally.counts["next_page_rows"] += 1
            page_time = row.ts
            if row.url:
                yield Event("click", query=query, url=row.url, ts=row.ts, rank=row.rank)
