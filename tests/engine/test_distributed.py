"""What rank 0 does alone: the others wait for it however long it takes, and fail with it."""

from __future__ import annotations

import os
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from common.engine import distributed
from tests.distributed.ranks import run_on_ranks

GROUP_TIMEOUT = timedelta(seconds=2)


def _patient(rank: int, port: int) -> None:
    """A process group that gives up after two seconds, and a task of four."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=GROUP_TIMEOUT)
    distributed.on_main_first(lambda: time.sleep(4))
    assert distributed.sum_over_ranks(torch.ones(())).item() == 2
    dist.destroy_process_group()


def _impatient(rank: int, port: int) -> None:
    """The same wait in a collective."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=GROUP_TIMEOUT)
    if rank == 0:
        time.sleep(4)
    dist.barrier()


@pytest.mark.distributed
def test_a_long_task_of_rank_0_times_nobody_out() -> None:
    mp.spawn(_patient, (20_000 + os.getpid() % 10_000,), nprocs=2)
    with pytest.raises(Exception, match=r"[Tt]imed out|timeout"):
        mp.spawn(_impatient, (20_001 + os.getpid() % 10_000,), nprocs=2)


def _fails(rank: int, world_size: int) -> str:
    def task() -> None:
        raise ValueError("no such log")

    for _ in range(2):
        try:
            distributed.on_main_first(task)
        except ValueError as error:
            message = str(error)
    return message


@pytest.mark.distributed
def test_every_rank_raises_what_rank_0_raised() -> None:
    assert run_on_ranks(_fails, 2) == ["no such log"] * 2
