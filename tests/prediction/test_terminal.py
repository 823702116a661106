from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.prediction.terminal import colour_of, escape, may_colour, show_query

RED, YELLOW, GREEN, RESET = "\x1b[31m", "\x1b[33m", "\x1b[32m", "\x1b[0m"


@given(st.text())
def test_nothing_that_steers_a_terminal_passes(text: str) -> None:
    steering = [*range(32), *range(127, 160), 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
    assert not set(map(chr, steering)) & set(escape(text))


def test_what_is_escaped_and_what_is_not() -> None:
    assert escape("a\x1b]0;title\x07b\r\n\x9b31m\u202e\ufeff") == r"a\x1b]0;title\x07b\r\n\x9b31m\u202e\ufeff"
    harmless = "café 北京\u3000天气 👩\u200d👩 می\u200cخواهم \ufffd 1\u00a0€"
    assert escape(harmless) == harmless


@pytest.mark.parametrize(
    ("score", "colour"), [(0.0, RED), (0.66, RED), (0.67, YELLOW), (1.33, YELLOW), (1.34, GREEN), (2.0, GREEN)]
)
def test_a_third_of_the_scale_has_one_colour(score: float, colour: str) -> None:
    assert colour_of(score) == colour


def test_words_are_coloured_and_what_is_between_them_is_not() -> None:
    query = "red, (hat)\x1b[2J !"
    assert show_query("red hat!", [2.0, 0.1], True) == f"{GREEN}red{RESET} {RED}hat{RESET}!"
    assert show_query("red hat!", [2.0, 0.1], False) == "red(2.0) hat(0.1)!"
    assert "\x1b[2J" not in show_query(query, [1.0, 1.0], True)


def test_colours_are_for_terminals_whose_user_wants_them(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert may_colour(Terminal()) and not may_colour(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not may_colour(Terminal())
