"""Step 3 with a rank that kills or stops itself at a chosen place: killed_main.py SIGNAL PLACE CALL RANK FLAGS...

PLACE names a function of the run; SIGNAL comes as rank RANK makes its CALL-th call to it (counted from 1).
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import deepspeed

from common.engine import checkpoint
from common.engine.hybrid import HybridEngine
from common.errors import run_rank_command
from common.generation.decode import Decoder
from step3_tppo import main
from step3_tppo.trainer import TPPOTrainer

PLACES: dict[str, tuple[Any, str]] = {
    "step": (TPPOTrainer, "_step"),
    "switch": (HybridEngine, "inference"),
    "gather": (deepspeed.zero.GatheredParameters, "__enter__"),
    "draw": (Decoder, "_draw"),
    "update": (TPPOTrainer, "_optimizer_step"),
    "checkpoint": (deepspeed.DeepSpeedEngine, "save_checkpoint"),
    "manifest": (checkpoint, "write_manifest"),
    "rotation": (checkpoint, "_superseded"),
}


def signalled_at(function: Callable[..., Any], call: int, number: signal.Signals) -> Callable[..., Any]:
    """`function` that sends this process the signal at its `call`-th call."""
    calls = 0

    def wrapped(*arguments: Any, **settings: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), number)
        return function(*arguments, **settings)

    return wrapped


if __name__ == "__main__":
    name_of_signal, place, call, rank, *flags = sys.argv[1:]
    if os.environ["RANK"] == rank:
        owner, name = PLACES[place]
        setattr(owner, name, signalled_at(getattr(owner, name), int(call), signal.Signals[name_of_signal]))
    sys.argv = ["main.py", *flags]
    run_rank_command(main.main)
