"""From records to examples: which searches are targets, what history precedes them, and which split they belong to.

The targets are `num_targets` searches in a row; the history is what stands before the first of them, so nothing that
happened at or after a target can be seen. A group (user, or topic) lies in one split only.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from common.config import check_numbers, option
from common.data.cleaning import RuleTally, hash_fraction
from common.data.records import SPLITS, Event, Example, Record, parse_time
from common.errors import InputError
from common.files import digest, read_jsonl

# AOL strips most punctuation, so a typed address may stand there as "www example com" or "example com".
_NAVIGATIONAL = re.compile(
    r"""
      https?://\S+
    | www [.\ ] \S+ (?:\ \S+)?
    | \S+ \ com
    | (?:[\w-]+\.)+ (?: com|net|org|edu|gov|mil|info|biz|tv|io|us|uk|ca|de|fr|au|eu ) (?: /\S* )?
    """,
    re.IGNORECASE | re.VERBOSE,
)


_NEEDED_FOR = {"train": "training", "dev": "the evaluation on held-out users", "test": "the final evaluation"}


@dataclass
class ExampleOptions:
    """How examples are cut from a record, and how they are split."""

    num_targets: int = option(
        3, "Queries to predict: searches in a row (the paper: 3 on AOL, 10 on its own log).", minimum=1
    )
    windows: int = option(1, "Examples a record: the newest N places for the targets; 1 is the last searches, 0 all.")
    navigational_targets: bool = option(False, "Let a query that is only a web address be a target.")
    max_history_events: int = option(200, "Newest events of a history that are kept; 0 keeps all.")
    dev_share: float = option(0.1, "Share of groups in dev, chosen by hash, where records name no split.", maximum=1)
    test_share: float = option(0.2, "Share of groups in test, chosen by hash, where records name no split.", maximum=1)
    split_time: str = option(
        "", "ISO time or seconds: train and dev targets must lie before it, test targets at it or after."
    )
    max_test_examples: int = option(2000, "Most examples in test, chosen by hash (the paper: 2000); 0 keeps all.")


class Window(NamedTuple):
    """A place for the targets: the index of each target's event, and of the first target among the searches."""

    events: tuple[int, ...]
    position: int


def is_navigational(query: str) -> bool:
    """Whether a query is only a web address ("www.example.com", "example.com/page", and AOL's "example com")."""
    return _NAVIGATIONAL.fullmatch(query.strip()) is not None


def cut_windows(events: Sequence[Event], num_targets: int, navigational_targets: bool) -> list[Window]:
    """Every place for the targets that has at least one event before it, oldest first.

    Targets follow each other directly among the searches that may be targets; a navigational search between two of
    them belongs neither to the targets nor, being later than the first, to the history.
    """
    searches = [
        index
        for index, event in enumerate(events)
        if event.type == "search" and (navigational_targets or not is_navigational(event.query))
    ]
    places = range(len(searches) - num_targets + 1)
    return [Window(tuple(searches[place : place + num_targets]), place) for place in places if searches[place] > 0]


class ExampleBuilder:
    """Cuts examples from cleaned records and gives each its split, counting what it leaves out.

    Raises `InputError` for options without sense and for a group whose records name different splits.
    """

    def __init__(self, options: ExampleOptions, seed: int) -> None:
        _check(options)
        self._options = options
        self._seed = seed
        self._split_time = _parse_split_time(options.split_time)
        self._named_splits: dict[str, str | None] = {}
        self._serial: dict[str, int] = {}

    def build(self, record: Record, tally: RuleTally) -> Iterator[Example]:
        """The record's examples, oldest first."""
        split = self._split(record)
        windows = cut_windows(record.events, self._options.num_targets, self._options.navigational_targets)
        if not tally.test("enough_targets", "records", bool(windows)):
            return
        if self._split_time is not None:
            windows = self._in_time(record, split, windows, tally)
        newest = windows[-self._options.windows :] if self._options.windows else windows
        tally.count("windows", "windows", len(newest), len(windows) - len(newest))
        name = self._name(record)
        for window in newest:
            yield self._example(record, split, window, name, tally)

    def _split(self, record: Record) -> str:
        named = self._named_splits.setdefault(record.group, record.split)
        if named != record.split:
            raise InputError(
                f"group {record.group!r}: one record names the split {named}, another ({record.user_id!r}) "
                f"{record.split}; a group must lie in one split, so make the field 'split' the same or leave it out"
            )
        if named is not None:
            return named
        place = hash_fraction("split", self._seed, record.group)
        if place < self._options.test_share:
            return "test"
        return "dev" if place < self._options.test_share + self._options.dev_share else "train"

    def _in_time(self, record: Record, split: str, windows: list[Window], tally: RuleTally) -> list[Window]:
        timed = [window for window in windows if all(record.events[index].ts is not None for index in window.events)]
        tally.count("split_time (no time)", "windows", len(timed), len(windows) - len(timed))
        kept = [window for window in timed if self._on_its_side(record, split, window)]
        tally.count("split_time", "windows", len(kept), len(timed) - len(kept))
        return kept

    def _on_its_side(self, record: Record, split: str, window: Window) -> bool:
        if split == "test":
            return record.events[window.events[0]].ts >= self._split_time
        return record.events[window.events[-1]].ts < self._split_time

    def _name(self, record: Record) -> str:
        """What the ids of a record's examples begin with; records of one user are told apart by number."""
        parts = [record.source, record.user_id]
        if record.session_id and record.session_id != record.user_id:
            parts.append(record.session_id)
        name = "/".join(parts)
        self._serial[name] = self._serial.get(name, 0) + 1
        return name if self._serial[name] == 1 else f"{name}/{self._serial[name]}"

    def _example(self, record: Record, split: str, window: Window, name: str, tally: RuleTally) -> Example:
        history = record.events[: window.events[0]]
        limit = self._options.max_history_events
        if limit:
            tally.test("max_history_events", "histories, dropped are shortened", len(history) <= limit)
            history = history[-limit:]
        return Example(
            id=f"{name}@{window.position}",
            user_id=record.user_id,
            group=record.group,
            source=record.source,
            split=split,
            history=history,
            targets=tuple(record.events[index].query for index in window.events),
        )


class HashSample:
    """Keeps the `size` examples with the smallest hashes (0: all), whatever the order they come in."""

    def __init__(self, size: int, seed: int) -> None:
        self._size = size
        self._seed = seed
        self._heap: list[tuple[int, int, Example]] = []
        self.offered = 0

    def offer(self, example: Example) -> None:
        """Keep `example`, or drop it or another for it."""
        self.offered += 1
        entry = (-int(digest("test sample", str(self._seed), example.id), 16), self.offered, example)
        if self._size and len(self._heap) == self._size:
            heapq.heappushpop(self._heap, entry)
        else:
            heapq.heappush(self._heap, entry)

    def examples(self) -> list[Example]:
        """The examples that were kept, in the order they were offered."""
        return [example for _, _, example in sorted(self._heap, key=lambda entry: entry[1])]


def load_examples(data_dir: str | Path, split: str) -> list[Example]:
    """The examples of one split of a prepared data folder, at least one.

    Raises `InputError` for a missing or empty file and, with file and line, for a row that is no example.
    """
    if split not in SPLITS:
        raise InputError(f"split {split!r} is none of {', '.join(SPLITS)}")
    path = Path(data_dir) / f"{split}.jsonl"
    if not path.is_file():
        raise InputError(f"{path}: no such file; make it with python -m common.data.prepare --output_dir {data_dir}")
    if not (examples := read_examples(path)):
        share = "" if split == "train" else f" with a larger --{split}_share, or"
        raise InputError(
            f"{path}: holds no example, and {_NEEDED_FOR[split]} needs some; make the data again with "
            f"python -m common.data.prepare{share} from a larger log"
        )
    return examples


def read_examples(path: str | Path) -> list[Example]:
    """The examples of one file; see `stream_examples`."""
    return list(stream_examples(path))


def stream_examples(path: str | Path) -> Iterator[Example]:
    """The examples of one file. Raises `InputError`, with file and line, for a row that is no example."""
    for number, row in read_jsonl(path):
        try:
            example = Example.from_dict(row)
        except (ValueError, TypeError) as error:
            raise InputError(f"{path}:{number}: not an example ({error})") from None
        yield example


def _parse_split_time(text: str) -> float | None:
    try:
        return parse_time(_date_or_number(text)) if text else None
    except ValueError as error:
        raise InputError(f"--split_time: {error}") from None


def _date_or_number(text: str) -> str | float:
    """`text` as a number, if it is one and no date such as 20240501."""
    if len(text) == 8 and text.isdigit():
        return text
    with suppress(ValueError):
        return float(text)
    return text


def _check(options: ExampleOptions) -> None:
    check_numbers(options)
    if options.dev_share + options.test_share > 1:
        shares = f"--dev_share {options.dev_share} and --test_share {options.test_share}"
        raise InputError(f"{shares} are more than 1 together")
