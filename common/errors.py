"""Errors that are the user's to mend, and how a command shows them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


class InputError(ValueError):
    """Bad input: the message names the place (file, line, flag) and the remedy, in one paragraph."""


class TrainingDiverged(RuntimeError):
    """A loss, gradient or reward is NaN or infinite; the last good checkpoint is kept."""


def run_command(main: Callable[[], None]) -> None:
    """Run a command's `main`; show an `InputError` or `TrainingDiverged` as one line and exit with 2 or 3.

    Ranks other than the first say which they are: most errors are every rank's, but some are one rank's alone.
    """
    rank = os.environ.get("RANK", "0")
    who = "" if rank == "0" else f"[rank {rank}] "
    try:
        main()
    except InputError as error:
        print(f"{who}error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    except TrainingDiverged as error:
        print(f"{who}diverged: {error}", file=sys.stderr, flush=True)
        raise SystemExit(3) from None
