"""Ranks: starting the process group, and sums over all of them."""

from __future__ import annotations

import atexit
import os
import random
from collections.abc import Callable, Iterable
from datetime import timedelta
from itertools import count
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.constants import default_pg_timeout
from deepspeed.runtime import bf16_optimizer
from torch.distributed import distributed_c10d
from transformers.utils import logging as transformers_output

from common.config import HANG_TIMEOUT

NO_LIMIT = timedelta(days=7)  # what one rank does alone may take as long as it must
WATCHDOG_MARGIN = timedelta(minutes=10)  # in which a watchdog notices the hang, names the rank and ends the job
_MEETINGS = count()


def start(hang_timeout: float = HANG_TIMEOUT) -> torch.device:
    """Join the process group that the launcher describes (a single process when there is none); returns the device.

    NCCL on CUDA, gloo on CPU ranks: DeepSpeed's accelerator decides. A collective gives up later than the watchdog
    with its `hang_timeout` (seconds; 0: no limit), which names the rank that hangs. DEEPSPEED_TIMEOUT can only raise
    this limit.
    """
    defaults = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for key, value in defaults.items():
        os.environ.setdefault(key, value)
    # Device first: NCCL binds a rank to the device that is current when the group is made.
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if os.environ["RANK"] != "0":
        # Every rank loads the same model: what transformers shows of it, bars and warnings, the first rank shows.
        transformers_output.disable_progress_bar()
        transformers_output.set_verbosity_error()
    if not dist.is_initialized():
        # On CPU ranks DeepSpeed would compile a shared-memory all-reduce, which only its own inference kernels call:
        # a minute of compiler time, and buffers that stay in /dev/shm after every run.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # It prints the memory of a moment while an engine is made, whatever DeepSpeed's log level.
        bf16_optimizer.see_memory_usage = lambda *message, **settings: None
        timeout = collective_timeout(hang_timeout)
        # DeepSpeed makes its groups for ZeRO without a timeout, so that they get torch's: 10 minutes with NCCL.
        distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = timeout
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False, timeout=timeout)
        # gloo's threads must have ended when the interpreter goes, or a finished rank may abort on its last step.
        atexit.register(_leave)
    return device


def collective_timeout(hang_timeout: float) -> timedelta:
    """After which time a collective gives up, with a watchdog's `hang_timeout` in seconds; 0 stands for none."""
    if hang_timeout == 0:
        return NO_LIMIT
    return max(timedelta(seconds=hang_timeout) + WATCHDOG_MARGIN, default_pg_timeout)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait until every rank is here."""
    if dist.is_initialized():
        dist.barrier()


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Elementwise sum of `values` (any shape, the same on every rank) over all ranks, as a new tensor beside them."""
    return _reduced(values, dist.ReduceOp.SUM)


def max_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Elementwise maximum of `values` over all ranks, as a new tensor beside them."""
    return _reduced(values, dist.ReduceOp.MAX)


def largest_over_ranks(value: int) -> int:
    """The largest `value` of any rank."""
    return int(max_over_ranks(torch.tensor(value, dtype=torch.int64)))


def _reduced(values: torch.Tensor, operation: dist.ReduceOp) -> torch.Tensor:
    """NCCL sends from the GPU alone, so that what lies in host memory takes the way over it."""
    total = values.detach().clone()
    if not dist.is_initialized():
        return total
    sent = total.to("cuda" if torch.cuda.is_available() else "cpu")
    dist.all_reduce(sent, op=operation)
    return sent.to(values.device)


def gather_from_ranks(value: Any) -> list[Any]:
    """`value` (any object that can be pickled) of each rank, in order, on every rank."""
    values = [value]
    if dist.is_initialized():
        values = [None] * world_size()
        dist.all_gather_object(values, value)
    return values


def true_on_any_rank(flag: bool) -> bool:
    """Whether `flag` is true on at least one rank; the same answer on all of them."""
    return bool(largest_over_ranks(int(flag)))


def on_main_first(task: Callable[[], Any]) -> None:
    """Run `task` on rank 0; when it raises there, every rank raises the same, instead of waiting in vain.

    The others wait on the launcher's key-value store until the task is done, not in a collective, which would give up
    after `collective_timeout` however well the task goes.
    """
    outcome: list[BaseException | None] = [None]
    if rank() == 0:
        try:
            task()
        except Exception as error:  # handed to all ranks and raised below
            outcome[0] = error
    if world_size() > 1:
        _wait_for([0])
        dist.broadcast_object_list(outcome, src=0)
    if outcome[0] is not None:
        raise outcome[0]


def wait_for_all() -> None:
    """Return once every rank is here, however long the slowest works; a `barrier` gives up after its timeout."""
    if world_size() > 1:
        _wait_for(range(world_size()))


def _wait_for(ranks: Iterable[int]) -> None:
    """Wait on the launcher's key-value store until `ranks` are here too; every rank counts the meetings alike."""
    store = distributed_c10d._get_default_store()
    meeting = f"tppo_meeting_{next(_MEETINGS)}"
    store.set(f"{meeting}_{rank()}", "here")
    store.wait([f"{meeting}_{number}" for number in ranks], NO_LIMIT)


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch on this rank."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
