"""Errors that are the user's to mend, and how a command shows them."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from typing import Any

HUNG = 70  # EX_SOFTWARE of sysexits.h: a rank made no progress
REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: try again


class InputError(ValueError):
    """Bad input: the message names the place (file, line, flag) and the remedy, in one paragraph."""


class TrainingDiverged(RuntimeError):
    """A loss, gradient or reward is NaN or infinite; the last good checkpoint is kept."""


class SaveFailed(RuntimeError):
    """A checkpoint could not be written; those from before are whole."""


class Preempted(RuntimeError):
    """A scheduler asked the run to stop; it was saved after `step` and can go on."""

    def __init__(self, step: int) -> None:
        super().__init__(
            f"asked to by a signal; saved after step {step}, the same command with --resume goes on from there"
        )


def one_line(error: BaseException | str, length: int = 300) -> str:
    """An error's text as a part of a paragraph: without line breaks, and cut, for it may quote what it is about."""
    text = " ".join(str(error).split())
    return text if len(text) <= length else f"{text[:length]}..."


def run_command(main: Callable[[], None]) -> None:
    """Run a command's `main`; show an error of ours as one line and exit.

    With 2 for bad input, 3 for a diverged run, 4 for a checkpoint that could not be written, and `REQUEUE` for a run
    that a scheduler stopped and may start again.

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
    except SaveFailed as error:
        print(f"{who}not saved: {error}", file=sys.stderr, flush=True)
        raise SystemExit(4) from None
    except Preempted as stop:
        print(f"{who}stopped: {stop}", file=sys.stderr, flush=True)
        raise SystemExit(REQUEUE) from None


def run_rank_command(main: Callable[[], None]) -> None:
    """`run_command` in a process that may be one rank of several, which then ends at once.

    gloo's threads outlive their process group for as long as somebody holds it, as DeepSpeed does, and a finished rank
    could abort while the interpreter was taken down: "terminate called without an active exception" (pytorch pull
    request 179291). What is to be done at exit is done first.
    """
    status: Any = 0
    try:
        run_command(main)
    except SystemExit as stop:
        status = stop.code
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        if status:
            raise SystemExit(status)
        return
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(status or 0))
