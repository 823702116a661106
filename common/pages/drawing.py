"""Drawing that must not cost a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from common.errors import one_line


def draw_or_tell(what: str, draw: Callable[[], Any]) -> None:
    """Call `draw`; what it raises is printed, not raised: hours of training are worth more than a picture of them."""
    try:
        draw()
    except Exception as error:
        print(f"warning: {what} could not be drawn: {type(error).__name__}: {one_line(error)}", flush=True)
