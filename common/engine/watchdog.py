"""A rank that hangs brings the job down within a set time, and says which rank it was and what it was doing.

Each rank tells its phase in a small file of its own (`heartbeat/rank3.json`); a thread beside the work keeps that file
fresh and looks at the clock. A rank that is stopped or gone gives no sign of life; one that waits in a collective
lives, but its phase grows old.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from common.engine.distributed import rank, world_size
from common.errors import HUNG

FOLDER = "heartbeat"
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
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        if self._timeout > 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            self.phase("start", 0)
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

    def phase(self, name: str, step: int) -> None:
        """Say what this rank does from now on."""
        self._phase = (name, step, time.time())

    def _watch(self) -> None:
        while not self._ended.wait(self._interval):
            self._write()
            if time.time() - self._phase[2] > self._timeout:
                print(self._report(), file=sys.stderr, flush=True)
                faulthandler.dump_traceback()
                os._exit(HUNG)

    def _write(self) -> None:
        name, step, since = self._phase
        path = self._folder / f"rank{rank()}.json"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"phase": name, "step": step, "since": since, "alive": time.time()}))
        temporary.replace(path)

    def _report(self) -> str:
        now = time.time()
        lines = [
            f"hung: rank {rank()} has made no progress for {now - self._phase[2]:.0f} s (--hang_timeout "
            f"{self._timeout:g}); the last checkpoint is kept, --resume goes on from it. All ranks:"
        ]
        for number in range(world_size()):
            beat = self._read(number)
            if beat is None:
                lines.append(f"  rank {number}: never began")
                continue
            silent = now - beat["alive"]
            state = f"no sign of life for {silent:.0f} s" if silent > 2 * self._interval + 1 else "alive"
            since = now - beat["since"]
            lines.append(f"  rank {number}: {state}, in {beat['phase']} of step {beat['step']} for {since:.0f} s")
        return "\n".join(lines)

    def _read(self, number: int) -> dict[str, Any] | None:
        try:
            return json.loads((self._folder / f"rank{number}.json").read_text())
        except (OSError, ValueError):
            return None
