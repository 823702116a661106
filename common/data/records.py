"""What a search log holds: users, their events in time order, and the examples cut from them."""

from __future__ import annotations

import re
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import unquote, urlsplit

EVENT_TYPES = ("search", "click", "purchase", "visit")
SPLITS = ("train", "dev", "test")

# How Python, pandas and databases write an id that is not there.
_MISSING = frozenset({"", "nan", "none", "null", "<na>", "nat", "\\n"})
_EXACT_WHOLE_NUMBERS = 2**53  # a float column may have merged ids past this

# A number of seconds from here on is a year past 5138, and a time of a search log in finer units is past March 1973
# from here on: so the size alone tells them apart. Each finer unit begins a factor of 1000 further up.
_FIRST_MILLISECONDS = 1e11
_FINER_UNITS = {"milliseconds": 1e3, "microseconds": 1e6, "nanoseconds": 1e9}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class MissingId(ValueError):
    """A row does not say whose it is; rows without an id must never become one user."""


@dataclass(frozen=True, slots=True)
class Event:
    """One thing a user did. `ts` is in seconds (None when the log has no time); `rank` is 1-based."""

    type: str
    query: str | None = None
    title: str | None = None
    url: str | None = None
    ts: float | None = None
    rank: int | None = None

    @property
    def text(self) -> str:
        """The query of a search; title, else the readable part of the URL, else the query, of anything else."""
        if self.type == "search":
            return self.query or ""
        return self.title or url_words(self.url) or self.query or ""

    def to_dict(self) -> dict[str, Any]:
        """JSON form, absent fields left out."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, row: Any) -> Event:
        """Validate one event; raises `ValueError` that names the field."""
        if not isinstance(row, dict):
            raise ValueError(f"an event must be an object, found {type(row).__name__}")
        kind = row.get("type")
        if kind not in EVENT_TYPES:
            raise ValueError(f"event type {kind!r} is none of {', '.join(EVENT_TYPES)}")
        event = cls(
            type=kind,
            query=_text(row, "query"),
            title=_text(row, "title"),
            url=_text(row, "url"),
            ts=parse_time(row.get("ts")),
            rank=_rank(row.get("rank")),
        )
        if kind == "search" and not (event.query or "").strip():
            raise ValueError("a search event needs a non-empty 'query'")
        if kind != "search" and not (event.title or event.url or event.query):
            raise ValueError(f"a {kind} event needs a 'title', a 'url' or a 'query'")
        return event


@dataclass(frozen=True, slots=True)
class Record:
    """One user (or session) of a log. `group` is the unit that must not be split between train and test."""

    user_id: str
    events: tuple[Event, ...]
    source: str
    group: str
    session_id: str | None = None
    split: str | None = None
    task: str | None = None
    persona: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON form, the generic log schema (docs/data_formats.md)."""
        row = asdict(self)
        row["events"] = [event.to_dict() for event in self.events]
        row["persona"] = list(self.persona)
        return {key: value for key, value in row.items() if key == "events" or value not in (None, [])}

    @classmethod
    def from_dict(cls, row: Any, default_source: str = "log") -> Record:
        """Validate one generic record; raises `ValueError` that names the field."""
        if not isinstance(row, dict):
            raise ValueError(f"a record must be an object, found {type(row).__name__}")
        user = _id(row, "user_id")
        if user is None:
            raise MissingId("a record needs a non-empty 'user_id'")
        events = row.get("events")
        if not isinstance(events, list):
            raise ValueError("a record needs a list 'events'")
        split = row.get("split")
        if split is not None and split not in SPLITS:
            raise ValueError(f"split {split!r} is none of {', '.join(SPLITS)}")
        persona = row.get("persona") or []
        if not isinstance(persona, list) or not all(isinstance(line, str) for line in persona):
            raise ValueError("'persona' must be a list of strings")
        return cls(
            user_id=user,
            events=tuple(Event.from_dict(event) for event in events),
            source=_text(row, "source") or default_source,
            group=_id(row, "group") or user,
            session_id=_id(row, "session_id"),
            split=split,
            task=_text(row, "task"),
            persona=tuple(persona),
        )


@dataclass(frozen=True, slots=True)
class Example:
    """A user's history and the next queries, the targets. No event of the history is later than a target."""

    id: str
    user_id: str
    group: str
    source: str
    split: str
    history: tuple[Event, ...]
    targets: tuple[str, ...]

    @property
    def searched(self) -> list[str]:
        """The queries of the history, oldest first."""
        return [event.query or "" for event in self.history if event.type == "search"]

    def to_dict(self) -> dict[str, Any]:
        """JSON form, one line of `train.jsonl`, `dev.jsonl` or `test.jsonl`."""
        row = asdict(self)
        row["history"] = [event.to_dict() for event in self.history]
        row["targets"] = list(self.targets)
        return row

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> Example:
        """Inverse of `to_dict`; raises `ValueError` for a line that is none of ours."""
        try:
            return cls(
                id=row["id"], user_id=row["user_id"], group=row["group"], source=row["source"], split=row["split"],
                history=tuple(Event.from_dict(event) for event in row["history"]), targets=tuple(row["targets"]),
            )
        except KeyError as error:
            raise ValueError(f"an example needs the field {error}") from None


def is_missing_id(value: Any) -> bool:
    """Whether an id is absent: None, NaN, an empty text, or a word such as "nan" or "null" in an id's place."""
    return value is None or value != value or (isinstance(value, str) and value.strip().casefold() in _MISSING)


def parse_id(value: Any, name: str) -> str:
    """An id, the value of column `name`, as text; a whole number in a float column counts as a whole number.

    Raises `MissingId` where there is none and `ValueError` for what is neither a text nor a whole number.
    """
    if is_missing_id(value):
        raise MissingId(f"{name} is missing, found {value!r}")
    if isinstance(value, float) and value.is_integer() and abs(value) < _EXACT_WHOLE_NUMBERS:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f"{name} {value!r:.40} is neither a text nor a whole number; ids in floats lose digits")
    return str(value)


def parse_time(value: Any) -> float | None:
    """Seconds from a number, an ISO 8601 text (UTC when it names no zone), or None.

    Raises `ValueError` for anything else, NaN and infinity included, and for a number that must be in a finer unit.
    """
    if value is None:
        return None
    if isinstance(value, str):
        return _parse_iso(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise ValueError(f"time {value!r:.40} is neither a finite number nor ISO 8601")
    _check_seconds(value)
    return float(value)


def _parse_iso(text: str) -> float:
    try:
        # Digits alone are read as a date at most: 13 of them, milliseconds, would make a time of the Middle Ages.
        moment = datetime.fromisoformat(text) if len(text) <= 8 or not text.isdigit() else None
    except ValueError:
        moment = None
    if moment is None:
        hint = "; write the number of seconds without quotes" if text.isdigit() else ""
        raise ValueError(f"time {text!r:.40} is neither a number nor ISO 8601{hint}")
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _check_seconds(value: float) -> None:
    """Raise `ValueError` that names the unit of a number too large for seconds; nothing is converted silently."""
    if abs(value) < _FIRST_MILLISECONDS:
        return
    for unit, per_second in _FINER_UNITS.items():
        if abs(value) < _FIRST_MILLISECONDS * per_second:
            date = (_EPOCH + timedelta(seconds=value / per_second)).date()
            raise ValueError(
                f"time {value!r:.40} is not in seconds; it looks like {unit} ({date}): divide all times by "
                f"{per_second:.0f}, or write ISO 8601"
            )
    raise ValueError(f"time {value!r:.40} is too large for a time in seconds")


def url_words(url: str | None) -> str:
    """A URL's readable part: the words of its last path segment, or its host where the path says nothing."""
    if not url:
        return ""
    try:
        parts = urlsplit(url if "//" in url else f"//{url}")
    except ValueError:  # e.g. an unbalanced bracket of an IPv6 host; the raw text is all there is
        return url
    segments = [segment for segment in unquote(parts.path).split("/") if segment]
    slug = re.sub(r"\.(html?|php|aspx?|jsp|pdf)$", "", segments[-1], flags=re.IGNORECASE) if segments else ""
    words = [word for word in re.split(r"[\W_]+", slug) if word and not word.isdigit()]
    return " ".join(words) if words else parts.netloc.removeprefix("www.")


def _id(row: dict, key: str) -> str | None:
    return None if is_missing_id(row.get(key)) else _text(row, key)


def _text(row: dict, key: str) -> str | None:
    value = row.get(key)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{key!r} must be a text, found {value!r}")
    return value


def _rank(value: Any) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise ValueError(f"'rank' must be a whole number, found {value!r}")
    return value
