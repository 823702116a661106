"""Errors that are the user's to mend, and how a command shows them."""

from __future__ import annotations

import sys
from collections.abc import Callable


class InputError(ValueError):
    """Bad input: the message names the place (file, line, flag) and the remedy, in one paragraph."""


class TrainingDiverged(RuntimeError):
    """A loss, gradient or reward is NaN or infinite; the last good checkpoint is kept."""


def run_command(main: Callable[[], None]) -> None:
    """Run a command's `main`; show an `InputError` or `TrainingDiverged` as one line and exit with 2 or 3."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    except TrainingDiverged as error:
        print(f"diverged: {error}", file=sys.stderr, flush=True)
        raise SystemExit(3) from None
