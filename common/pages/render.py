"""Pages as one file: Jinja templates that escape every value, styles and images inside, nothing to be fetched."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from common.pages.colours import hexadecimal, reward_colour, strength
from common.text import visible_line

LINE_BREAK = "⏎"
INVISIBLE = "�"
BLANK = "␣"
END = "end"


def render(template: str, **values: Any) -> str:
    """The text of a page from `templates/`. What is no markup of the template itself is escaped."""
    return _ENVIRONMENT.get_template(template).render(**values)


def visible_token(text: str) -> str:
    """A token's text as a piece of a line, without outer spaces. Line breaks and invisible characters are shown as
    marks, for a token may be nothing else; a special token, which has no text, as "end"."""
    if not text:
        return END
    return "".join(_visible_character(char) for char in text).strip(" ") or BLANK


def signed(value: float | None, digits: int = 2) -> str:
    """`+0.25`, `−0.25`, `0.00`; a dash for None."""
    if value is None:
        return "–"
    rounded = round(value, digits) + 0.0  # + 0.0: no negative zero
    sign = "+" if rounded > 0 else "−" if rounded < 0 else ""
    return f"{sign}{abs(rounded):.{digits}f}"


def background(reward: float) -> str:
    """The colour of a reward for CSS."""
    return hexadecimal(reward_colour(reward))


def _visible_character(char: str) -> str:
    if char == "\n":
        return LINE_BREAK
    category = unicodedata.category(char)
    return " " if category in ("Cc", "Zl", "Zp") else INVISIBLE if category in ("Cf", "Cs") else char


def _environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    made.filters |= {
        "line": visible_line, "token": visible_token, "signed": signed, "background": background, "strength": strength
    }
    return made


_ENVIRONMENT = _environment()
