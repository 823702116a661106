"""Cleaning a log, rule by rule, with the literature's defaults; every rule counts what it kept and dropped.

Rules about a user look at the whole record as it was logged and drop it or keep it. Rules about an event look at its
query, so a click goes with the query it belongs to; the rule for private data looks at titles as well.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from common.config import check_numbers, option
from common.data.privacy import has_private_data, mask_url
from common.data.records import Event, Record
from common.errors import InputError
from common.files import digest, read_text
from common.text import normalise, split_words

DAY = 86_400


@dataclass
class CleaningOptions:
    """What of a log is kept. A zero turns a rule off."""

    user_share: float = option(
        1.0, "Share of groups (users) that are kept, chosen by hash, to sample a large log.", above=0, maximum=1
    )
    max_queries_per_day: int = option(100, "Drop users with more searches than this on one day: suspected bots.")
    max_queries: int = option(1000, "Drop users with more searches than this in all: suspected bots.")
    adult_words: str = option("", "File with a word or phrase a line; users who searched for one are dropped.")
    min_chars: int = option(2, "Drop queries with fewer characters.")
    max_chars: int = option(100, "Drop queries with more characters.")
    max_words: int = option(20, "Drop queries with more words.")
    pii_filter: bool = option(True, "Drop queries and titles with a mail address, phone number or five digits.")
    k_anonymity: int = option(0, "Drop queries that fewer users than this have issued; reads every log twice.")
    merge_repeats: bool = option(True, "Make one search of a query that is repeated directly.")
    min_queries: int = option(0, "Drop users with fewer different queries; 0 means num_targets + 1, 1 keeps everybody.")


@dataclass
class RuleTally:
    """For each rule, in the order of first use: how many things it kept and how many it dropped."""

    kept: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    units: dict[str, str] = field(default_factory=dict)

    def count(self, rule: str, unit: str, kept: int, dropped: int) -> None:
        """Add to a rule's counts; `unit` says what is counted (records, events, windows, ...)."""
        self.units[rule] = unit
        self.kept[rule] += kept
        self.dropped[rule] += dropped

    def test(self, rule: str, unit: str, keep: bool) -> bool:
        """Count one thing and return `keep`."""
        self.count(rule, unit, int(keep), int(not keep))
        return keep

    def add(self, other: RuleTally) -> None:
        """Add all counts of `other`."""
        for rule, unit in other.units.items():
            self.count(rule, unit, other.kept[rule], other.dropped[rule])

    def to_dict(self) -> dict[str, dict[str, int | str]]:
        """Rule -> unit, kept, dropped."""
        return {
            rule: {"unit": unit, "kept": self.kept[rule], "dropped": self.dropped[rule]}
            for rule, unit in self.units.items()
        }


class Cleaner:
    """Applies the rules of `options` to records.

    `frequent` holds the normalised queries that k-anonymity allows (`common.data.privacy.frequent_queries`); it is
    needed when that rule is on. Raises `InputError` for options that contradict each other and for a bad file of
    adult words.
    """

    def __init__(
        self, options: CleaningOptions, num_targets: int, seed: int, frequent: frozenset[str] = frozenset()
    ) -> None:
        _check(options)
        self._options = options
        self._seed = seed
        self._min_queries = options.min_queries or num_targets + 1
        self._adult = _read_phrases(options.adult_words) if options.adult_words else frozenset()
        self._record_rules = self._enabled_record_rules()
        self._event_rules = self._enabled_event_rules(frequent)

    def clean(self, record: Record, tally: RuleTally) -> Record | None:
        """The cleaned record, or None when a rule drops it. White space and control characters become one space."""
        events: Sequence[Event] = [tidy_event(event) for event in record.events]
        for rule, keep in self._record_rules.items():
            if not tally.test(rule, "records", keep(record, events)):
                return None
        for rule, keep_event in self._event_rules.items():
            kept = [event for event in events if keep_event(event)]
            tally.count(rule, "events", len(kept), len(events) - len(kept))
            events = kept
        if self._options.pii_filter:
            events = [_mask(event, tally) for event in events]
        if self._options.merge_repeats:
            events = merge_repeats(events, tally)
        different = {normalise(event.query) for event in events if event.type == "search"}
        if not tally.test("min_queries", "records", len(different) >= self._min_queries):
            return None
        return replace(record, events=tuple(events))

    def _enabled_record_rules(self) -> dict[str, Callable[[Record, Sequence[Event]], bool]]:
        options = self._options
        rules: dict[str, Callable[[Record, Sequence[Event]], bool]] = {}
        if options.user_share < 1:
            rules["user_share"] = lambda record, _: hash_fraction("user", self._seed, record.group) < options.user_share
        if options.max_queries:
            rules["max_queries"] = lambda _, events: len(_queries(events)) <= options.max_queries
        if options.max_queries_per_day:
            rules["max_queries_per_day"] = lambda _, events: busiest_day(events) <= options.max_queries_per_day
        if self._adult:
            rules["adult_words"] = lambda _, events: not any(map(self._is_adult, _queries(events)))
        return rules

    def _enabled_event_rules(self, frequent: frozenset[str]) -> dict[str, Callable[[Event], bool]]:
        options = self._options
        rules: dict[str, Callable[[str], bool]] = {"no_words": lambda query: bool(split_words(query))}
        if options.min_chars:
            rules["min_chars"] = lambda query: len(query) >= options.min_chars
        if options.max_chars:
            rules["max_chars"] = lambda query: len(query) <= options.max_chars
        if options.max_words:
            rules["max_words"] = lambda query: len(split_words(query)) <= options.max_words
        if options.k_anonymity:
            rules["k_anonymity"] = lambda query: normalise(query) in frequent
        event_rules: dict[str, Callable[[Event], bool]] = {
            name: lambda event, keep=keep: event.query is None or keep(event.query) for name, keep in rules.items()
        }
        if options.pii_filter:
            event_rules["pii_filter"] = lambda event: not has_private_data(f"{event.query or ''}|{event.title or ''}")
        return event_rules

    def _is_adult(self, query: str) -> bool:
        text = f" {normalise(query)} "
        words = text.split()
        return not self._adult.isdisjoint(words) or any(
            f" {phrase} " in text for phrase in self._adult if " " in phrase
        )


def merge_repeats(events: Sequence[Event], tally: RuleTally) -> list[Event]:
    """`events` without searches whose query equals the search before (clicks between them stay, and do not matter)."""
    merged: list[Event] = []
    last: str | None = None
    for event in events:
        if event.type == "search":
            query = normalise(event.query)
            if not tally.test("merge_repeats", "searches", query != last):
                continue
            last = query
        merged.append(event)
    return merged


def busiest_day(events: Sequence[Event]) -> int:
    """Most searches on one day (UTC, or days from the start where times are relative); searches without time aside."""
    days = Counter(event.ts // DAY for event in events if event.type == "search" and event.ts is not None)
    return max(days.values(), default=0)


def hash_fraction(purpose: str, seed: int, name: str) -> float:
    """A number in [0, 1) that depends on its arguments alone, even over the names: for draws that never change."""
    return int(digest(purpose, str(seed), name), 16) / 16**16


def _queries(events: Sequence[Event]) -> list[str]:
    return [event.query for event in events if event.type == "search"]


def tidy_event(event: Event) -> Event:
    """`event` with its texts on one line each, without control characters; every rule sees events so."""
    query, title, url = (_one_line(text) for text in (event.query, event.title, event.url))
    if event.type == "search":
        query = query or ""  # white space alone: left for the rule no_words to count
    if (query, title, url) == (event.query, event.title, event.url):
        return event
    return replace(event, query=query, title=title, url=url)


def _one_line(text: str | None) -> str | None:
    """`text` with control characters and white space as single spaces; None where nothing is left."""
    if text is None:
        return None
    if not text.isprintable():
        text = "".join(" " if unicodedata.category(char) == "Cc" else char for char in text)
    return " ".join(text.split()) or None


def _mask(event: Event, tally: RuleTally) -> Event:
    if event.url is None:
        return event
    url = mask_url(event.url)
    tally.test("pii_in_url", "urls, dropped are masked", url == event.url)
    return event if url == event.url else replace(event, url=url)


def _read_phrases(path: str) -> frozenset[str]:
    try:
        lines = read_text(path).splitlines()
    except InputError as error:
        raise InputError(f"--adult_words {error}") from None
    phrases = frozenset(filter(None, map(normalise, lines)))
    if not phrases:
        raise InputError(f"--adult_words {path}: holds no word; expected one word or phrase a line")
    return phrases


def _check(options: CleaningOptions) -> None:
    check_numbers(options)
    if options.max_chars and options.min_chars > options.max_chars:
        raise InputError(f"--min_chars {options.min_chars} is above --max_chars {options.max_chars}: no query is left")
