"""Pre-emption: a scheduler's signal makes a run save and end, so that it can be queued again.

SIGTERM and SIGUSR1 are noticed (Slurm: `--signal=USR1@300`), by whichever rank gets one; all ranks then end together
after the step they are in.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

from common.engine.distributed import true_on_any_rank

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preemption:
    """Listens while it is entered (in the main thread); the handlers from before are put back."""

    def __init__(self) -> None:
        self._asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Preemption:
        self._before = {number: signal.signal(number, self._notice) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def requested_here(self) -> bool:
        """Whether this rank was asked to stop."""
        return self._asked

    def requested(self) -> bool:
        """Whether any rank was asked to stop; the same answer on all. Call on all ranks."""
        return true_on_any_rank(self._asked)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
