"""The histories to predict for: from a log in any format that this project reads, or from prepared examples."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from common.data.cleaning import tidy_event
from common.data.examples import stream_examples
from common.data.readers import AUTO, read_log
from common.data.readers.lines import read_byte_lines
from common.data.records import Event, Record
from common.errors import InputError
from common.files import digest


class History(NamedTuple):
    """What a user did, oldest first, under the id that a prediction carries."""

    id: str
    user_id: str
    events: tuple[Event, ...]


class Survey(NamedTuple):
    """How many histories a file holds, and a digest of what they say."""

    count: int
    digest: str


def survey_histories(histories: Iterable[History]) -> Survey:
    """Read all of `histories` once, keeping none, so that what cannot be read is told before any work."""
    count, running = 0, digest()
    for history in histories:
        count += 1
        row = [history.id, history.user_id, [event.to_dict() for event in history.events]]
        running = digest(running, json.dumps(row, ensure_ascii=False))
    return Survey(count, running)


def read_histories(path: str | Path, log_format: str = AUTO, max_bad_lines: int = 0) -> Iterator[History]:
    """Stream the histories in `path`, in its order: of each example, or of each record of a log (all its events).

    Texts are tidied as those of the training data were; no other rule of cleaning is applied. Raises `InputError` for
    a file that cannot be read (with the line) and for a history without an event.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file; check --history")
    if not (path.is_file() or path.is_dir()):
        raise InputError(f"{path}: neither a file nor a folder, so it cannot be read twice; write it to a file first")
    if path.is_file() and log_format == AUTO and _holds_examples(path):
        histories = (History(example.id, example.user_id, example.history) for example in stream_examples(path))
    else:
        records = read_log(path, log_format, max_bad_lines)
        histories = (History(_record_id(record), record.user_id, record.events) for record in records)
    for place, history in enumerate(histories, start=1):
        yield _tidied(history, place, path)


def _holds_examples(path: Path) -> bool:
    """Whether the first line is a JSON object with a `history`; a log has `events` or is no JSON at all."""
    first = next((line for _, line in read_byte_lines(path) if line.strip()), b"")
    try:
        row = json.loads(first)
    except (ValueError, RecursionError):
        return False  # the log's reader says what is wrong, and where
    return isinstance(row, dict) and "history" in row


def _record_id(record: Record) -> str:
    parts = [record.source, record.user_id]
    if record.session_id and record.session_id != record.user_id:
        parts.append(record.session_id)
    return "/".join(parts)


def _tidied(history: History, place: int, path: Path) -> History:
    events = tuple(event for event in map(tidy_event, history.events) if event.text)
    if not events:
        raise InputError(
            f"{path}: history {place} (id {history.id!r}) holds no event with a text; leave it out: there is nothing "
            "to predict from"
        )
    return history._replace(events=events)
