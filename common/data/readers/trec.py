"""TREC Session Track 2011 to 2014: `sessiontrack<year>.xml`, plain or gzip.

A session has interactions (query, results, clicks) and, mostly, a `currentquery` at its end, which is the last
search. Clicks name a result of their interaction by rank. A further result page is an interaction with the same
query. Times are wall clock (may pass midnight) or seconds; both become seconds from the session's start. Text is
escaped twice, some of it has JSON escapes (a literal `\\u00a3`, `\\/`), and the 2012 file holds a bare `&`.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree.ElementTree import Element, ParseError

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import iterparse

from common.data.readers.lines import ReadTally, read_byte_lines
from common.data.records import Event, MissingId, Record, is_missing_id, parse_time
from common.errors import InputError

HALF_DAY = 43_200.0

_BARE_AMPERSAND = re.compile(rb"&(?!(?:amp|lt|gt|quot|apos|#\d+|#x[0-9A-Fa-f]+);)")
_JSON_CHARACTERS = re.compile(r"(?:\\u[0-9A-Fa-f]{4})+")
_ROOT = re.compile(r"sessiontrack(20\d\d)")


def read(path: Path, tally: ReadTally) -> Iterator[Record]:
    """Stream one record a session; its group is the topic, since several sessions share one.

    Counts `next_page_interactions`, `interactions_without_query`, `clicks_without_result` and `bare_ampersands`. Raises
    `InputError` with file and line for broken XML or another kind of XML, and for a DTD: the file may be anybody's.
    """
    source = _LineSource(path, tally)
    try:
        elements = iterparse(source, events=("start", "end"), forbid_dtd=True)
        _, root = next(elements)
        match = _ROOT.fullmatch(root.tag)
        if not match:
            raise InputError(f"{path}:{source.number}: root element <{root.tag}>, expected <sessiontrack2011> to 2014")
        for kind, element in elements:
            if kind == "end" and element.tag == "session":
                try:
                    yield _record(element, match[1], tally)
                except ValueError as error:
                    tally.reject(f"{path}:{source.number}", error, f"session {element.get('num')!r} ends here; ")
                root.clear()
    except ParseError as error:
        raise InputError(f"{path}:{error.position[0]}: not well-formed XML ({error.msg})") from None
    except LookupError as error:  # an encoding that nobody knows; a key or index that is missing is a fault of ours
        if type(error) is not LookupError:
            raise
        raise InputError(f"{path}:{source.number}: not readable XML ({error})") from None
    except DefusedXmlException:
        raise InputError(
            f"{path}:{source.number}: declares a DTD or entities, which are not read; remove the <!DOCTYPE ...>"
        ) from None


class _LineSource:
    """A file object that gives one repaired line a read, so that `number` is the line the parser has come to."""

    def __init__(self, path: Path, tally: ReadTally) -> None:
        self._lines = read_byte_lines(path)
        self._counts = tally.counts
        self.number = 0

    def read(self, size: int = -1) -> bytes:
        self.number, line = next(self._lines, (self.number, b""))
        line, repaired = _BARE_AMPERSAND.subn(b"&amp;", line)
        if repaired:
            self._counts["bare_ampersands"] += repaired
        return line


def _record(session: Element, year: str, tally: ReadTally) -> Record:
    number = _id(session, "num")
    if number is None:
        raise MissingId("the session has no 'num'")
    session_id = f"trec{year}-s{number}"
    user = _id(session, "userid")
    topic = session.find("topic")
    topic_number = None if topic is None else _id(topic, "num")
    return Record(
        user_id=f"trec{year}-u{user}" if user else session_id,
        events=_events(session, tally),
        source=f"trec_session_{year}",
        group=f"trec{year}-t{topic_number}" if topic_number else session_id,
        session_id=session_id,
        task=_text(session, "topic/desc") or None,
    )


def _events(session: Element, tally: ReadTally) -> tuple[Event, ...]:
    start = session.get("starttime") or "0"
    events: list[Event] = []
    last_query = ""
    for element in session:
        if element.tag not in ("interaction", "currentquery"):
            continue
        query = _text(element, "query")
        if not query:
            tally.counts["interactions_without_query"] += 1
            continue
        if query == last_query:
            tally.counts["next_page_interactions"] += 1
        else:
            events.append(Event("search", query=query, ts=_seconds(element.get("starttime"), start)))
        last_query = query
        events += _clicks(element, query, start, tally)
    # A click may be later than the next search (two tabs); without all times the file's order is what there is.
    if all(event.ts is not None for event in events):
        events.sort(key=lambda event: event.ts)
    return tuple(events)


def _clicks(interaction: Element, query: str, start: str, tally: ReadTally) -> Iterator[Event]:
    results = {_number(result.get("rank")): result for result in interaction.iterfind("results/result")}
    for click in interaction.iterfind("clicked/click"):
        rank = _number(click.findtext("rank"))
        result = results.get(rank)
        if result is None:
            tally.counts["clicks_without_result"] += 1
            continue
        yield Event(
            "click",
            query=query,
            title=_text(result, "title") or None,
            # Not html.unescape: it would read "&copy=1" of a URL's own parameters as a character.
            url=(result.findtext("url") or "").strip().replace("&amp;", "&") or None,
            ts=_seconds(click.get("starttime"), start),
            rank=rank,
        )


def _id(element: Element, name: str) -> str | None:
    value = element.get(name)
    return None if is_missing_id(value) else value


def _text(element: Element, path: str) -> str:
    """The text under `path`, free of the second escaping, the JSON escapes and all white space but single spaces."""
    text = html.unescape(element.findtext(path) or "")
    text = _JSON_CHARACTERS.sub(_decode_json_characters, text)
    return " ".join(text.replace("\\/", "/").replace('\\"', '"').split())


def _decode_json_characters(match: re.Match[str]) -> str:
    return bytes.fromhex(match[0].replace("\\u", "")).decode("utf-16-be", errors="replace")


def _seconds(time: str | None, start: str) -> float | None:
    """Seconds from `start` to `time`; a wall clock that passed midnight goes on counting."""
    if not time:
        return None
    elapsed = _clock(time) - _clock(start)
    if ":" in time:
        elapsed = (elapsed + HALF_DAY) % (2 * HALF_DAY) - HALF_DAY
    return round(elapsed, 6)


def _clock(text: str) -> float:
    try:
        parts = [float(part) for part in text.split(":")]
    except ValueError:
        parts = []
    if len(parts) not in (1, 3):
        raise ValueError(f"time {text!r} is neither HH:MM:SS nor seconds")
    return parse_time(sum(part * unit for part, unit in zip(reversed(parts), (1, 60, 3600), strict=False)))


def _number(text: str | None) -> int:
    if not (text or "").strip().isdigit():
        raise ValueError(f"rank {text!r} is no number")
    return int(text)
