"""A step's command with a rank that kills or stops itself: killed_main.py COMMAND SIGNAL PLACE CALL RANK FLAGS...

COMMAND is the step's module; PLACE names a function of the run; SIGNAL comes as rank RANK makes its CALL-th call to it
(counted from 1).
"""

from __future__ import annotations

import os
import pkgutil
import signal
import sys
from collections.abc import Callable
from typing import Any

from common.errors import run_rank_command

PLACES = {  # where it is looked up, and its name there
    "step": ("step3_tppo.trainer:TPPOTrainer", "step"),
    "switch": ("common.engine.hybrid:HybridEngine", "inference"),
    "draw": ("common.generation.decode:Decoder", "_draw"),
    "update": ("step3_tppo.updates:Updater", "_optimizer_step"),
    "checkpoint": ("deepspeed:DeepSpeedEngine", "save_checkpoint"),
    "manifest": ("common.engine.checkpoint", "write_manifest"),
    "rotation": ("common.engine.checkpoint", "_superseded"),
    "trainer_step": ("common.engine.trainer:RecipeTrainer", "training_step"),
    "trainer_manifest": ("common.engine.trainer", "write_manifest"),
}


def signalled_at(function: Callable[..., Any], call: int, number: signal.Signals) -> Callable[..., Any]:
    """`function` that sends this process the signal at its `call`-th call."""
    calls = 0

    def wrapped(*arguments: Any, **settings: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            print(f"sends itself {number.name}", file=sys.stderr, flush=True)
            os.kill(os.getpid(), number)
        return function(*arguments, **settings)

    return wrapped


if __name__ == "__main__":
    command, name_of_signal, place, call, rank, *flags = sys.argv[1:]
    main = pkgutil.resolve_name(f"{command}:main")
    if os.environ["RANK"] == rank:
        owner, name = pkgutil.resolve_name(PLACES[place][0]), PLACES[place][1]
        setattr(owner, name, signalled_at(getattr(owner, name), int(call), signal.Signals[name_of_signal]))
    sys.argv = ["main.py", *flags]
    run_rank_command(main)
