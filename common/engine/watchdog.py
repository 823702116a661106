"""A rank that hangs brings the job down within a set time, and says which rank it was and what it was doing.

Each rank tells its phase in a small file of its own (`heartbeat/rank3.json`); a thread beside the work keeps that file
fresh and looks at the clock. A rank that is stopped or gone gives no sign of life; one that waits in a collective
lives, but its phase grows old. A rank that has done its share and waits for the others is not hung as long as one of
them makes progress. A rank that leaves in good order, or by an error that it reports itself, says so there.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from contextlib import nullcontext, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from common.access import naming
from common.engine.distributed import rank, world_size
from common.errors import HUNG, InputError

FOLDER = "heartbeat"
WAITING = "wait for the others"  # the phase of a rank that has done its share
_LOOKS = 5  # times a timeout that the clock is looked at
_LONGEST_LOOK = 10.0  # seconds


class Watchdog:
    """Ends this process, with status `HUNG`, once its phase is older than `timeout` seconds; 0 watches nothing."""

    def __init__(self, output_dir: str | Path, timeout: float) -> None:
        self._folder = Path(output_dir) / FOLDER
        self._timeout = timeout
        self._interval = min(timeout / _LOOKS, _LONGEST_LOOK)
        self._phase = ("start", 0, time.time())
        self._ended = threading.Event()
        self._writing = threading.Lock()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        if self._timeout > 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._phase = ("start", 0, time.time())
            self._write()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        if error is not None:
            name, step, _ = self._phase
            error.add_note(f"in {name} of step {step}")  # common.errors shows it
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            with suppress(OSError) if error else nullcontext():  # a full disk may be what the error is about
                self._write()

    def phase(self, name: str, step: int) -> None:
        """Say what this rank does from now on."""
        is_new = self._phase[:2] != (name, step)
        self._phase = (name, step, time.time())
        if is_new and self._thread is not None:
            self._write()  # at once: a rank that dies in it must be found in it

    def _watch(self) -> None:
        while not self._ended.wait(self._interval):
            with suppress(OSError):  # the next phase raises it where it can be told
                self._write()
            if time.time() - self._last_progress() > self._timeout:
                print(self._report(), file=sys.stderr, flush=True)
                faulthandler.dump_traceback()
                os._exit(HUNG)

    def _last_progress(self) -> float:
        """When this rank made progress; when any rank did, while this one waits for the others."""
        name, _, since = self._phase
        beats = self._beats() if name == WAITING else []
        return max([since, *(beat["since"] for beat in beats if beat)])

    def _beats(self) -> list[dict[str, Any] | None]:
        """The last heartbeat of each rank; None for one that has not begun."""
        return [_read(self._folder / f"rank{number}.json") for number in range(world_size())]

    def _write(self) -> None:
        name, step, since = self._phase
        path = self._folder / f"rank{rank()}.json"
        temporary = path.with_suffix(".tmp")
        beat = {"phase": name, "step": step, "since": since, "alive": time.time(), "ended": self._ended.is_set()}
        beat |= {"host": socket.gethostname(), "pid": os.getpid()}
        with self._writing, naming(path):
            temporary.write_text(json.dumps(beat))
            temporary.replace(path)

    def _report(self) -> str:
        now = time.time()
        lines = [
            f"hung: rank {rank()} has seen no progress for {now - self._last_progress():.0f} s (--hang_timeout "
            f"{self._timeout:g}); what is saved is kept, --resume goes on from it. All ranks:"
        ]
        for number, beat in enumerate(self._beats()):
            if beat is None:
                lines.append(f"  rank {number}: never began")
                continue
            silent = now - beat["alive"]
            state = f"no sign of life for {silent:.0f} s" if silent > 2 * self._interval + 1 else "alive"
            since = now - beat["since"]
            lines.append(f"  rank {number}: {state}, in {beat['phase']} of step {beat['step']} for {since:.0f} s")
        return "\n".join(lines)


def silent_ends(output_dir: str | Path, since: float) -> str:
    """Which ranks of the run in `output_dir` ended without a word after the time `since` (seconds), the first on top.

    Empty when all of them ended in good order or none has begun. A rank that was killed, by a signal, by the kernel for
    its memory or with its machine, cannot speak for itself; its last heartbeat says what it was doing. Those that the
    launcher then killed give signs of life for longer.
    """
    beats = {path.stem: _read(path) for path in (Path(output_dir) / FOLDER).glob("rank*.json")}
    silent = {name: beat for name, beat in beats.items() if beat and not beat["ended"] and beat["alive"] > since}
    if not silent:
        return ""
    lines = [
        f"  {name.replace('rank', 'rank ')}: in {beat['phase']} of step {beat['step']}, last heard of at "
        f"{datetime.fromtimestamp(beat['alive']):%H:%M:%S}"
        for name, beat in sorted(silent.items(), key=lambda item: item[1]["alive"])
    ]
    return "\n".join(
        [
            "ended without a word, the first one first (a kill, also the kernel's for want of memory: see dmesg; a "
            "crash in a library; a machine that went away):",
            *lines,
            "checkpoints are whole or absent: the same command with --resume goes on from the last one",
        ]
    )


def refuse_second_writer(output_dir: str | Path) -> None:
    """Raise `InputError` where ranks of another job still write to `output_dir`.

    Such are the ranks that a killed launcher has left behind. Processes of this machine alone can be looked for.
    """
    beats = map(_read, (Path(output_dir) / FOLDER).glob("rank*.json"))
    writers = sorted(beat["pid"] for beat in beats if beat and _still_writes(beat))
    if writers:
        pids = " ".join(map(str, writers))
        raise InputError(f"{output_dir}: another run is still writing here; wait for it, or end it: kill {pids}")


def _still_writes(beat: dict[str, Any]) -> bool:
    if beat["ended"] or beat.get("host") != socket.gethostname() or beat["pid"] == os.getpid():
        return False
    try:
        process = psutil.Process(beat["pid"])
        # A number may be another process's by now: one that began after the heartbeat is.
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= beat["alive"]
    except psutil.NoSuchProcess:
        return False


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
