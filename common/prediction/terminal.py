"""Text from logs and models on a terminal: what could steer it is escaped, and words are coloured by their score."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence
from typing import TextIO

from common.models.reward_losses import MAX_SCORE
from common.text import split_words

_RESET = "\x1b[0m"
# Red, yellow, green of the basic palette, which every theme keeps readable: a third of the scale each.
_COLOURS = ("\x1b[31m", "\x1b[33m", "\x1b[32m")
# Joiners shape letters in Persian, Indic scripts and emoji; alone among format characters they steer nothing.
_JOINERS = "\u200c\u200d"


def escape(text: str) -> str:
    """`text` with whatever is no letter, mark, number, sign or space spelled out, such as `\\x1b` and `\\u202e`."""
    return "".join(char if _is_harmless(char) else char.encode("unicode_escape").decode("ascii") for char in text)


def may_colour(stream: TextIO) -> bool:
    """Whether `stream` is a terminal whose user has not asked for no colours (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


def show_query(query: str, word_scores: Sequence[float], colour: bool) -> str:
    """A query, escaped, each word coloured by its score in 0..2; without colours the score stands behind the word."""
    shown, end = [], 0
    for word, score in zip(split_words(query), word_scores, strict=True):
        text = escape(word.text)
        coloured = f"{colour_of(score)}{text}{_RESET}" if colour else f"{text}({score:.1f})"
        shown += [escape(query[end : word.start]), coloured]
        end = word.end
    return "".join([*shown, escape(query[end:])])


def legend(colour: bool) -> str:
    """What the marks of `show_query` mean."""
    if not colour:
        return f"behind each word its score, 0 to {MAX_SCORE}; behind each query its score, 0 to 1"
    names = zip(_COLOURS, ("irrelevant", "relevant", "very relevant"), strict=True)
    words = ", ".join(f"{code}{name}{_RESET}" for code, name in names)
    return f"words: {words}; behind each query its score, 0 to 1"


def colour_of(score: float) -> str:
    """The escape sequence that begins the colour of a score in 0..2."""
    return _COLOURS[min(int(score * len(_COLOURS) / MAX_SCORE), len(_COLOURS) - 1)]


def _is_harmless(char: str) -> bool:
    return char.isprintable() or char in _JOINERS or unicodedata.category(char) == "Zs"
