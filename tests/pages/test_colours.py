"""The colour of a reward says its sign and its size, and text on it can be read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.pages.colours import BEST, NEUTRAL, TEXT, WORST, Rgb, hexadecimal, reward_colour, strength

rewards = st.floats(-3, 3)


@given(rewards, rewards)
def test_a_higher_reward_is_never_less_blue_nor_more_orange(first: float, second: float) -> None:
    low, high = sorted((first, second))
    (low_red, _, low_blue), (high_red, _, high_blue) = reward_colour(low), reward_colour(high)
    assert low_red - low_blue >= high_red - high_blue
    assert strength(low) <= strength(high)


@pytest.mark.parametrize(
    ("reward", "limit", "expected"),
    [(0.0, 1.0, NEUTRAL), (1.0, 1.0, BEST), (7.0, 1.0, BEST), (-1.0, 1.0, WORST), (-9.0, 2.0, WORST), (2.0, 2.0, BEST)],
)
def test_the_ends_are_reached_at_the_limit_and_kept_beyond_it(reward: float, limit: float, expected: Rgb) -> None:
    assert reward_colour(reward, limit) == expected


def test_a_quarter_of_the_limit_is_half_way() -> None:
    assert strength(0.25) == 0.5 and strength(-0.25) == -0.5 and strength(1.0, limit=4.0) == 0.5
    assert reward_colour(0.25) == (175, 208, 227)  # the mean of #f7f7f7 and #67a9cf
    assert hexadecimal(reward_colour(0.25)) == "#afd0e3"


def luminance(colour: Rgb) -> float:
    """Relative luminance (WCAG 2.2)."""
    linear = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@given(rewards)
def test_dark_text_can_be_read_on_every_colour(reward: float) -> None:
    assert (luminance(reward_colour(reward)) + 0.05) / (luminance(TEXT) + 0.05) > 4.5
