"""What a search log holds: users, their events in time order, and the examples cut from them."""

from __future__ import annotations

import re
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import unquote, urlsplit

EVENT_TYPES = ("search", "click", "purchase", "visit")
SPLITS = ("train", "dev", "test")


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
        user = _text(row, "user_id")
        if not user:
            raise ValueError("a record needs a non-empty 'user_id'")
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
            group=_text(row, "group") or user,
            session_id=_text(row, "session_id"),
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


def parse_time(value: Any) -> float | None:
    """Seconds from a number, an ISO 8601 text (UTC when it names no zone), or None.

    Raises `ValueError` for anything else, NaN and infinity included.
    """
    if value is None:
        return None
    if isinstance(value, str):
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            raise ValueError(f"time {value!r} is neither a number nor ISO 8601") from None
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise ValueError(f"time {value!r:.40} is neither a finite number nor ISO 8601")
    return float(value)


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


def _text(row: dict, key: str) -> str | None:
    value = row.get(key)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{key!r} must be a text, found {value!r}")
    return value


def _rank(value: Any) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise ValueError(f"'rank' must be a whole number, found {value!r}")
    return value
