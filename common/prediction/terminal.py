"""Text from logs and models on a terminal: what could steer it is escaped, and each token is on the colour of its
reward, that of the HTML pages."""

from __future__ import annotations

import math
import os
import unicodedata
from collections.abc import Sequence
from itertools import product
from typing import TextIO

from common.pages.colours import TEXT, Rgb, reward_colour
from common.pages.samples import LEGEND

_CUBE: list[Rgb] = list(product((0, 95, 135, 175, 215, 255), repeat=3))
# Joiners shape letters in Persian, Indic scripts and emoji; alone among format characters they steer nothing.
_JOINERS = "\u200c\u200d"


def escape(text: str) -> str:
    """`text` with whatever is no letter, mark, number, sign or space spelled out, such as `\\x1b` and `\\u202e`."""
    return "".join(char if _is_harmless(char) else char.encode("unicode_escape").decode("ascii") for char in text)


def colour_depth(stream: TextIO) -> int:
    """Bits of a colour that `stream` shows: 24, 8 (the 256 colours of xterm), or 0 where it is no terminal, or its user
    has asked for no colours (no-color.org)."""
    if not stream.isatty() or os.environ.get("NO_COLOR"):
        return 0
    return 24 if os.environ.get("COLORTERM") in ("truecolor", "24bit") else 8


def show_tokens(tokens: Sequence[tuple[str, float]], depth: int) -> str:
    """A query from its tokens (text, reward), escaped, each on the colour of its reward; at `depth` 0 (`colour_depth`)
    the reward stands behind it."""
    shown = []
    for text, reward in tokens:
        text = text.strip("\n")
        body = text.lstrip(" ")
        shown.append(" " * (len(text) - len(body)))
        if body:
            shown.append(_on_colour(escape(body), reward, depth) if depth else f"{escape(body)}({reward:+.2f})")
    return "".join(shown).strip(" ")


def legend(depth: int) -> str:
    """What the marks of `show_tokens` mean."""
    scores = "behind each query its score, 0 to 1"
    if not depth:
        return f"behind each token its reward (a query is worth -1 to 1); {scores}"
    scale = "".join(_on_colour(f" {reward:+.2f} ", reward, depth) for reward in LEGEND)
    return f"each token on the colour of its reward: {scale}; {scores}"


def xterm_colour(colour: Rgb) -> int:
    """The nearest of xterm's colours 16 to 231, a cube of 6 x 6 x 6.

    Differences between channels, the hue, count twice: a pale blue, the sign of a reward, must not become a grey.
    """
    return 16 + min(range(len(_CUBE)), key=lambda place: math.dist(_with_hue(_CUBE[place]), _with_hue(colour)))


def _with_hue(colour: Rgb) -> tuple[int, ...]:
    red, green, blue = colour
    return red, green, blue, 2 * (red - blue), 2 * (green - blue)


def _on_colour(text: str, reward: float, depth: int) -> str:
    front, back = (_colour_code(colour, depth) for colour in (TEXT, reward_colour(reward)))
    return f"\x1b[38;{front};48;{back}m{text}\x1b[0m"


def _colour_code(colour: Rgb, depth: int) -> str:
    """What follows 38 (text) or 48 (background) in an escape sequence (ISO 8613-6)."""
    return "2;{};{};{}".format(*colour) if depth == 24 else f"5;{xterm_colour(colour)}"


def _is_harmless(char: str) -> bool:
    return char.isprintable() or char in _JOINERS or unicodedata.category(char) == "Zs"
