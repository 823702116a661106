"""Run a function on several real processes joined by gloo, and collect what each returns."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.multiprocessing as mp


def run_on_ranks(function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
    """`[function(rank, world_size, *arguments) of each rank]`; `function` is a module's own, results can be pickled.

    A process that raises fails the test with its traceback.
    """
    with TemporaryDirectory() as folder:
        context = mp.get_context("spawn")
        port = _free_port()
        processes = [
            context.Process(target=_rank, args=(rank, world_size, port, folder, function, arguments))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout=240)
            if process.is_alive():
                process.kill()
        outcomes = [_outcome(Path(folder), rank) for rank in range(world_size)]
    errors = [outcome for kind, outcome in outcomes if kind == "error"]
    assert not errors, "\n".join(errors)
    return [value for _, value in outcomes]


def _rank(
    rank: int, world_size: int, port: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1",
    )
    torch.set_num_threads(1)
    try:
        from common.engine import distributed

        distributed.start()
        outcome = ("value", function(rank, world_size, *arguments))
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    except BaseException:  # reported by the parent, whatever it is
        outcome = ("error", f"rank {rank}:\n{traceback.format_exc()}")
    torch.save(outcome, Path(folder) / f"{rank}.pt")


def _outcome(folder: Path, rank: int) -> tuple[str, Any]:
    path = folder / f"{rank}.pt"
    if not path.exists():
        return "error", f"rank {rank} ended without a result (killed, or hung for 240 s)"
    return torch.load(path, weights_only=False)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
