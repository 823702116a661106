"""Gathering rows that belong together from a stream too large for memory."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack

from common.access import naming, scratch_folder
from common.private import only_mine

ROWS_IN_MEMORY = 2_000_000

Row = tuple[str, str, float]


def group_rows(
    rows: Iterable[Row], num_rows: int, rows_in_memory: int = ROWS_IN_MEMORY
) -> Iterator[tuple[str, list[Row]]]:
    """Yield `(key, rows)` for every first field, rows in their order of arrival.

    At most about `rows_in_memory` rows are held: where `num_rows` is more, the rows are first spread by a hash of
    their key over that many temporary files (in TMPDIR, removed at the end), and each file is grouped by itself.
    """
    partitions = -(-num_rows // rows_in_memory)
    if partitions <= 1:
        yield from _grouped(rows)
        return
    with scratch_folder("grouping-") as folder:
        paths = [folder / f"{number}.jsonl" for number in range(partitions)]
        with naming(folder), ExitStack() as stack:
            streams = [stack.enter_context(open(path, "w", encoding="utf-8", opener=only_mine)) for path in paths]
            for row in rows:
                streams[zlib.crc32(row[0].encode()) % partitions].write(json.dumps(row) + "\n")
        for path in paths:
            with path.open(encoding="utf-8") as stream:
                yield from _grouped(tuple(json.loads(line)) for line in stream)


def _grouped(rows: Iterable[Row]) -> Iterator[tuple[str, list[Row]]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[0], []).append(row)
    yield from groups.items()
