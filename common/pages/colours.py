"""The colour of a reward: orange below zero, blue above it, nearly white at zero.

The ends are those of ColorBrewer's RdBu with three classes: people with a colour vision deficiency tell them apart, and
they are light enough for dark text (WCAG asks for a contrast of 4.5).
"""

from __future__ import annotations

import math

Rgb = tuple[int, int, int]

WORST: Rgb = (239, 138, 98)
NEUTRAL: Rgb = (247, 247, 247)
BEST: Rgb = (103, 169, 207)
TEXT: Rgb = (26, 26, 26)
# A whole query's worst and best reward; a word or token of it has a part of this.
LIMIT = 1.0


def strength(reward: float, limit: float = LIMIT) -> float:
    """Where `reward` lies between the ends, -1..1: clipped at `limit`, and by its square root in between.

    A word of a three-word query is worth a third of it or less; on a linear scale most tokens would look alike.
    """
    share = min(abs(reward) / limit, 1.0)
    return math.copysign(math.sqrt(share), reward)


def reward_colour(reward: float, limit: float = LIMIT) -> Rgb:
    """The background of a token with this reward, each channel in 0..255."""
    place = strength(reward, limit)
    end = WORST if place < 0 else BEST
    red, green, blue = (round(a + (b - a) * abs(place)) for a, b in zip(NEUTRAL, end, strict=True))
    return red, green, blue


def hexadecimal(colour: Rgb) -> str:
    """`#rrggbb`, for CSS and matplotlib."""
    return "#{:02x}{:02x}{:02x}".format(*colour)
