from __future__ import annotations

import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.pages.colours import reward_colour
from common.pages.samples import LEGEND
from common.prediction.terminal import colour_depth, escape, legend, show_tokens, xterm_colour

RESET = "\x1b[0m"


@given(st.text())
def test_nothing_that_steers_a_terminal_passes(text: str) -> None:
    steering = [*range(32), *range(127, 160), 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
    assert not set(map(chr, steering)) & set(escape(text))


def test_what_is_escaped_and_what_is_not() -> None:
    assert escape("a\x1b]0;title\x07b\r\n\x9b31m\u202e\ufeff") == r"a\x1b]0;title\x07b\r\n\x9b31m\u202e\ufeff"
    harmless = "café 北京\u3000天气 👩\u200d👩 می\u200cخواهم \ufffd 1\u00a0€"
    assert escape(harmless) == harmless


@given(st.floats(-2, 2))
def test_a_token_stands_on_the_colour_that_the_pages_give_its_reward(reward: float) -> None:
    red, green, blue = reward_colour(reward)
    assert show_tokens([("hat", reward)], 24) == f"\x1b[38;2;26;26;26;48;2;{red};{green};{blue}mhat{RESET}"
    assert show_tokens([("hat", reward)], 8) == f"\x1b[38;5;16;48;5;{xterm_colour((red, green, blue))}mhat{RESET}"


@pytest.mark.parametrize(
    ("colour", "number"),
    [
        ((0, 0, 0), 16), ((255, 255, 255), 231), ((95, 135, 175), 67), ((255, 0, 0), 196), ((26, 26, 26), 16),
        ((247, 247, 247), 231),
        ((239, 138, 98), 209), ((103, 169, 207), 74),  # the ends of the scale: (255, 135, 95) and (95, 175, 215)
    ],
)  # fmt: skip
def test_the_nearest_of_256_colours(colour: tuple[int, int, int], number: int) -> None:
    assert xterm_colour(colour) == number


@given(st.floats(0.05, 1))
def test_the_sign_of_a_reward_shows_in_256_colours(reward: float) -> None:
    good, bad = (xterm_colour(reward_colour(value)) - 16 for value in (reward, -reward))
    assert good % 6 > good // 36 and bad % 6 < bad // 36  # more blue than red, and the reverse


def test_tokens_stand_side_by_side_and_what_could_steer_is_escaped() -> None:
    tokens = [(" re", 0.25), ("d", -0.5), (" hat\n", 0.0), ("\x1b[2J", 0.1), (" ", 0.0)]
    shown = show_tokens(tokens, 24)
    assert re.sub(r"\x1b\[[0-9;]*m", "", shown) == r"red hat\x1b[2J"
    assert shown.count(RESET) == 4
    assert show_tokens(tokens[:3], 0) == "re(+0.25)d(-0.50) hat(+0.00)"


def test_the_legend_shows_the_scale_of_the_pages() -> None:
    shown = legend(24)
    assert shown.count(RESET) == len(LEGEND)
    assert all(show_tokens([(f"{reward:+.2f} ", reward)], 24) in shown.replace("m ", "m") for reward in LEGEND)
    assert "\x1b" not in legend(0) and "behind each token its reward" in legend(0)


def test_colours_are_for_terminals_whose_user_wants_them(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.delenv("COLORTERM", raising=False)
    assert (colour_depth(Terminal()), colour_depth(io.StringIO())) == (8, 0)
    monkeypatch.setenv("COLORTERM", "truecolor")
    assert (colour_depth(Terminal()), colour_depth(io.StringIO())) == (24, 0)
    monkeypatch.setenv("NO_COLOR", "1")
    assert colour_depth(Terminal()) == 0
