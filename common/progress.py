"""Progress bars: on rank 0 alone, and for a phase only where it takes long."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
PHASE_DELAY = 10.0  # seconds


def is_main_process() -> bool:
    """Whether this process is rank 0 (or the only one), from the launcher's environment."""
    return int(os.environ.get("RANK", "0")) == 0


def progress(
    items: Iterable[Item] | None = None,
    *,
    total: int | None = None,
    desc: str,
    initial: int = 0,
    unit: str = "it",
    **settings: Any,
) -> tqdm:
    """A tqdm bar that only rank 0 shows, and only if it has a name; `settings` are tqdm's own."""
    shown = bool(desc) and is_main_process()
    return tqdm(
        items, total=total, desc=desc, initial=initial, unit=unit, disable=not shown, dynamic_ncols=True, **settings
    )


def phase_progress(
    items: Iterable[Item] | None = None, *, total: int | None = None, desc: str, unit: str = "it"
) -> tqdm:
    """The bar of a phase that is often short: it appears only after `PHASE_DELAY` seconds, and it goes with the phase.

    A part of a longer loop gets one, so that the loop's own bar does not stand alone and still for minutes.
    """
    return progress(items, total=total, desc=desc, unit=unit, delay=PHASE_DELAY, leave=False)
