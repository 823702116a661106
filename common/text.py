"""Queries as texts: lines, words, and the form in which two texts are compared."""

from __future__ import annotations

import unicodedata
from functools import lru_cache
from typing import NamedTuple

# Scripts written without spaces: one character is one word (docs/method.md, section 2).
_CJK_RANGES = (
    (0x2E80, 0x2FDF),  # radicals
    (0x3040, 0x30FF),  # Hiragana, Katakana
    (0x3400, 0x4DBF),  # ideographs, extension A
    (0x4E00, 0x9FFF),  # ideographs
    (0xF900, 0xFAFF),  # compatibility ideographs
    (0x20000, 0x323AF),  # ideographs, extensions B to H
)

STOP_WORDS = frozenset(
    "a about above after again all also am an and any are as at be because been before being below between both "
    "but by can could did do does doing down during each few for from further had has have having he her here hers "
    "him his how i if in into is it its itself just me more most my near no nor not now of off on once only or "
    "other our out over own s same she should so some such t than that the their them then there these they this "
    "those through to too under until up very was we were what when where which while who whom why will with "
    "would you your".split()
)


class Word(NamedTuple):
    """A word of a response: its text, its half-open character span, and the line (query) it stands in."""

    text: str
    start: int
    end: int
    line: int


def split_words(text: str) -> list[Word]:
    """Words of `text` in reading order.

    A word is a maximal run of non-space characters with outer punctuation stripped; a CJK character is a word
    by itself. A run of punctuation alone is no word. Lines are separated by `\\n` and numbered from 0.
    """
    words: list[Word] = []
    line = start = 0
    for position, char in enumerate(text + " "):
        if char.isspace() or _is_cjk(char):
            _append_stripped(words, text, start, position, line)
            start = position + 1
            if _is_cjk(char):
                words.append(Word(char, position, position + 1, line))
            elif char == "\n":
                line += 1
    return words


def split_queries(response: str) -> list[str]:
    """The lines of a response, stripped, empty ones kept (they are format errors); a trailing newline adds none."""
    lines = response.split("\n")
    if lines and not lines[-1].strip():
        lines.pop()
    return [line.strip() for line in lines]


@lru_cache(maxsize=2**16)  # judging compares the same few queries of a user with each other again and again
def normalise(text: str) -> str:
    """The form in which two texts count as equal: NFKC, case-folded, outer punctuation off each word, one space."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    folded = unicodedata.normalize("NFKC", folded)  # folding a letter may leave its accents out of order
    return " ".join(word.text for word in split_words(folded))


def visible_line(text: str) -> str:
    """`text` as one line that shows what it holds: white space and control characters become single spaces, invisible
    format characters (which could reverse the line) and lone surrogates (which no file can hold) are left out."""
    spaced = "".join(" " if unicodedata.category(char) in ("Cc", "Zl", "Zp") else char for char in text)
    visible = "".join(char for char in spaced if unicodedata.category(char) not in ("Cf", "Cs"))
    return " ".join(visible.split())


def content_words(text: str) -> list[str]:
    """Normalised words of `text` without stop words, in order."""
    return [word for word in normalise(text).split(" ") if word and word not in STOP_WORDS]


def _append_stripped(words: list[Word], text: str, start: int, end: int, line: int) -> None:
    while start < end and _is_punctuation(text[start]):
        start += 1
    while end > start and _is_punctuation(text[end - 1]):
        end -= 1
    if start < end:
        words.append(Word(text[start:end], start, end, line))


def _is_punctuation(char: str) -> bool:
    return unicodedata.category(char)[0] == "P"


def _is_cjk(char: str) -> bool:
    code = ord(char)
    if code < _CJK_RANGES[0][0]:
        return False
    # The Katakana block holds punctuation too (the middle dot between two names).
    return any(low <= code <= high for low, high in _CJK_RANGES) and not _is_punctuation(char)
