"""Run a function on several real processes joined by gloo, and collect what each returns.

The processes are started once for a world size and serve many calls: importing torch, transformers and deepspeed takes
longer than most tests. After a failure they are replaced, because a collective may hang half-way.
"""

from __future__ import annotations

import atexit
import gc
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.multiprocessing as mp

TIMEOUT_SECONDS = 480
_POOLS: dict[int, RankPool] = {}


def run_on_ranks(function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
    """`[function(rank, world_size, *arguments) of each rank]`; `function` is a module's own, results can be pickled.

    A process that raises fails the test with its traceback.
    """
    if world_size not in _POOLS:
        _POOLS[world_size] = RankPool(world_size)
    outcomes = _POOLS[world_size].call(function, arguments)
    errors = [outcome for kind, outcome in outcomes if kind == "error"]
    if errors:
        _POOLS.pop(world_size).stop()
    assert not errors, "\n".join(errors)
    return [value for _, value in outcomes]


class RankPool:
    """`world_size` spawned processes in one gloo group, each waiting for functions to run."""

    def __init__(self, world_size: int) -> None:
        context = mp.get_context("spawn")
        port = _free_port()
        pipes = [context.Pipe() for _ in range(world_size)]
        self._connections = [ours for ours, _ in pipes]
        self._processes = [
            context.Process(target=_serve, args=(rank, world_size, port, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self._processes:
            process.start()
        atexit.register(self.stop)

    def call(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> list[tuple[str, Any]]:
        """`("value", result)` or `("error", traceback)` of each rank."""
        for connection in self._connections:
            connection.send((function, arguments))
        deadline = time.monotonic() + TIMEOUT_SECONDS
        return [self._outcome(rank, deadline) for rank in range(len(self._connections))]

    def stop(self) -> None:
        """Kill the processes."""
        for process in self._processes:
            process.kill()

    def _outcome(self, rank: int, deadline: float) -> tuple[str, Any]:
        try:
            if self._connections[rank].poll(max(0.0, deadline - time.monotonic())):
                return self._connections[rank].recv()
        except (EOFError, ConnectionResetError):
            return "error", f"rank {rank} died"
        return "error", f"rank {rank} gave no answer in {TIMEOUT_SECONDS} s"


def _serve(rank: int, world_size: int, port: int, connection: Connection) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1",
    )
    torch.set_num_threads(1)
    from common.engine import distributed

    distributed.start()
    while True:
        function, arguments = connection.recv()
        # DeepSpeed collects garbage with every engine it makes: without what has been imported, in no time.
        gc.collect()
        gc.freeze()
        try:
            outcome = ("value", function(rank, world_size, *arguments))
        except BaseException:  # reported by the caller, whatever it is
            outcome = ("error", f"rank {rank}:\n{traceback.format_exc()}")
        connection.send(outcome)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
