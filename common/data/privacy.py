"""Private data in a search log: what is recognised, and the counting behind k-anonymity.

The patterns are those that search logs are cleaned with (mail, phone, social security number, any run of five digits);
they find forms, not meaning: names, addresses in words and searches for oneself are not found. The strongest measure
is k-anonymity: keep a query only if at least k users have issued it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from urllib.parse import unquote

from common.data.records import Record
from common.text import normalise

MASK = "*"

_PRIVATE = re.compile(
    r"""
      [\w.+-]+ (?: @ | %40 ) [\w-]+ (?: \.[\w-]+ )+                   # mail
    | (?<!\d) \d{3} [-\ ] \d{2} [-\ ] \d{4} (?!\d)                     # social security number
    | (?<!\d) (?: \(\d{2,4}\) \s? | \d{2,4} [\s.-] ) \d{3,4} [\s.-]? \d{3,4} (?!\d)  # phone with an area code
    | (?<!\d) \d{3} [.-] \d{4} (?!\d)                                  # phone without
    | \d{5,}                                                           # any longer number
    """,
    re.VERBOSE,
)


def has_private_data(text: str) -> bool:
    """Whether `text` holds a mail address, a phone or social security number, or five digits in a row.

    Full-width forms count as what they show, and invisible characters between digits do not part them.
    """
    visible = "".join(char for char in text if unicodedata.category(char) != "Cf")
    return _PRIVATE.search(unicodedata.normalize("NFKC", visible)) is not None


def mask_private(text: str) -> str:
    """`text` with each character of private data replaced by `*`, white space aside: places and words stay.

    Where private data shows in another form only (full-width digits, invisible characters), every character is
    replaced.
    """
    if not has_private_data(text):
        return text
    masked = _PRIVATE.sub(lambda match: _stars(match.group()), text)
    return _stars(text) if has_private_data(masked) else masked


def mask_url(url: str) -> str:
    """`url`, percent escapes decoded, with private data replaced by `*`; a URL without any is returned as it is.

    Page numbers look like private numbers, so a URL is masked where a query is dropped.
    """
    readable = unquote(url)
    if not has_private_data(url) and not has_private_data(readable):
        return url
    masked = _PRIVATE.sub(MASK, unicodedata.normalize("NFKC", readable))
    return ",".join(masked.split())  # a plus could begin a mail address


def frequent_queries(records: Iterable[Record], min_users: int) -> frozenset[str]:
    """Normalised queries that at least `min_users` different users have issued.

    Holds every different query of the log, with up to `min_users` user ids each.
    """
    users: dict[str, set[str]] = {}
    for record in records:
        for query in {normalise(event.query) for event in record.events if event.type == "search"}:
            issuers = users.setdefault(query, set())
            if len(issuers) < min_users:
                issuers.add(record.user_id)
    return frozenset(query for query, issuers in users.items() if len(issuers) >= min_users)


def _stars(text: str) -> str:
    return "".join(char if char.isspace() else MASK for char in text)
