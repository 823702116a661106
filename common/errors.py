"""Errors that are the user's to mend, and how a command shows them."""

from __future__ import annotations

import atexit
import errno
import os
import re
import site
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from common.output import prepare_output
from common.private import only_mine

DEBUG_FLAG = "--debug"
RUN_CONFIG_NAME = "run_config.json"  # marks a folder as one run's

_ROOT = Path(__file__).resolve().parents[1]
HUNG = 70  # EX_SOFTWARE of sysexits.h: a rank made no progress
REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: try again


class InputError(ValueError):
    """Bad input: the message names the place (file, line, flag) and the remedy, in one paragraph."""


class TrainingDiverged(RuntimeError):
    """A loss, gradient or reward is NaN or infinite; the last good checkpoint is kept."""


class SaveFailed(RuntimeError):
    """A checkpoint could not be written; those from before are whole."""


class Preempted(RuntimeError):
    """A scheduler asked the run to stop; `saved` names what is kept, from which it can go on."""

    def __init__(self, saved: str) -> None:
        super().__init__(f"asked to by a signal; {saved}, the same command with --resume goes on from there")


def one_line(error: BaseException | str, length: int = 300) -> str:
    """An error's text as a part of a paragraph: without line breaks, and cut, for it may quote what it is about."""
    text = " ".join(str(error).split())
    return text if len(text) <= length else f"{text[:length]}..."


def run_command(main: Callable[[], None]) -> None:
    """Run a command's `main`; show an error as one paragraph and exit.

    With 2 for bad input and for a file that the user has no right to, 3 for a diverged run, 4 for what could not be
    written, `REQUEUE` for a run that a scheduler stopped and may start again, and 1 for an error that nobody foresaw,
    whose traceback goes to a file.
    `--debug`, which is taken out of the arguments, or TPPO_DEBUG=1 in the environment shows every error's traceback.

    Ranks other than the first say which they are: most errors are every rank's, but some are one rank's alone.
    """
    prepare_output()
    debug = DEBUG_FLAG in sys.argv[1:] or os.environ.get("TPPO_DEBUG", "") not in ("", "0")
    sys.argv[1:] = [argument for argument in sys.argv[1:] if argument != DEBUG_FLAG]
    rank = os.environ.get("RANK", "0")
    who = "" if rank == "0" else f"[rank {rank}] "
    try:
        main()
    except Exception as error:
        text = "".join(traceback.format_exception(error))
        if debug:
            print(text, end="", file=sys.stderr)
        kind, status, message = _shown(error)
        if kind == _UNFORESEEN and not debug:
            message += f". {DEBUG_FLAG} shows the traceback; it {keep_traceback(text, rank)}"
        print(f"{who}{kind}: {message}", file=sys.stderr, flush=True)
        raise SystemExit(status) from None


# How a foreseen error's line begins, and the command's exit status.
_FORESEEN: dict[type[Exception], tuple[str, int]] = {
    InputError: ("error", 2),
    TrainingDiverged: ("diverged", 3),
    SaveFailed: ("not saved", 4),
    Preempted: ("stopped", REQUEUE),
}
_UNFORESEEN = "failed"
_LOST_PEER = re.compile(r"Connection (closed|reset) by peer|Failed to recv, got 0 bytes|Broken pipe")
# What the operating system refuses: a file that the user has no right to, and a disk without room.
NO_RIGHT = (errno.EACCES, errno.EPERM, errno.EROFS)
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _shown(error: Exception) -> tuple[str, int, str]:
    """How an error's line begins, the command's exit status, and the text of the line."""
    for known, (kind, status) in _FORESEEN.items():
        if isinstance(error, known):
            return kind, status, str(error)
    if isinstance(error, OSError):
        if error.errno in NO_RIGHT and error.filename is not None:
            what = f"{error.filename}: {error.strerror}"
            return "error", 2, f"{what}; choose another place, or ask for the right to this one"
        if error.errno in NO_ROOM:
            what = f"{_place(error) if error.filename is None else error.filename}: {error.strerror}"
            return "not saved", 4, f"{what}; make room, then repeat the command (a run: with --resume)"
        if str(error.strerror).startswith("No usable temporary directory"):  # Python's tempfile
            return "error", 2, f"{error.strerror}; set TMPDIR to a folder with room"
    if lost_peer(error):
        return "stopped", 1, "another rank has ended; what it says itself, or its launcher, is the reason"
    return _UNFORESEEN, 1, describe(error)


def lost_peer(error: Exception) -> bool:
    """Whether an error is about the end of another rank, in the words of gloo and of torch's key-value store."""
    return isinstance(error, RuntimeError) and _LOST_PEER.search(str(error)) is not None


def describe(error: Exception) -> str:
    """An unforeseen error's type and text, the last line of this project's own code that it passed, and its notes."""
    what = f"{type(error).__name__}: {one_line(error)}".removesuffix(": ")
    notes = map(one_line, getattr(error, "__notes__", ()))
    return f"{what} ({', '.join([_place(error), *notes])}){_advice(error)}"


def _place(error: Exception) -> str:
    """The last line of this project's own code that an error passed, as FILE:LINE."""
    frames = traceback.extract_tb(error.__traceback__)
    frames = frames[1:] or frames  # run_command itself is the first
    last = next((frame for frame in reversed(frames) if _is_own(Path(frame.filename))), frames[-1])
    path = Path(last.filename)
    return f"{path.relative_to(_ROOT) if path.is_relative_to(_ROOT) else path}:{last.lineno}"


def _advice(error: Exception) -> str:
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return ". The GPU's memory is full: docs/scaling_up.md says what to make smaller, and in which order"
    return ""


def keep_traceback(text: str, rank: str) -> str:
    """Append a traceback to a file, in the run's folder, if --output_dir names one, else in TMPDIR; say where it is.

    A folder that is not, or not yet, a run's is left as it is. What cannot be written is printed.
    """
    folder = _argument("--output_dir")
    try:
        if folder is None or not (Path(folder) / RUN_CONFIG_NAME).is_file():
            folder = tempfile.mkdtemp(prefix="tppo_")
        path = Path(folder) / f"traceback_rank{rank}.txt"
        with open(path, "a", encoding="utf-8", opener=only_mine) as stream:  # an error may quote users
            stream.write(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC  {' '.join(sys.argv)}\n{text}\n")
    except OSError as error:  # the disk may be what failed
        print(text, end="", file=sys.stderr)
        return f"stands above, for it could not be kept ({one_line(error)})"
    return f"is kept in {path}"


def _argument(flag: str) -> str | None:
    """The last value of a flag on the command line."""
    value = None
    for argument, following in pairwise([*sys.argv, ""]):
        if argument == flag:
            value = following
        elif argument.startswith(f"{flag}="):
            value = argument.partition("=")[2]
    return value


def _is_own(path: Path) -> bool:
    return path.is_relative_to(_ROOT) and not any(path.is_relative_to(folder) for folder in site.getsitepackages())


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
