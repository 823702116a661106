"""What a rank does alone: the others wait for it however long it takes, and fail with it."""

from __future__ import annotations

import dataclasses
import os
import time
from datetime import timedelta

import deepspeed
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from baselines.dpo.config import DpoConfig
from common.config import HANG_TIMEOUT
from common.engine import distributed
from step1_sft.config import SftConfig
from step2_token_reward.config import Step2Config
from step2_token_reward.sample_config import SampleConfig
from step3_tppo.config import Step3Config
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


def _uneven(rank: int, port: int) -> None:
    """Rank 1 works for four seconds on its own where the process group gives up after two."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=GROUP_TIMEOUT)
    time.sleep(4 * rank)
    distributed.wait_for_all()
    assert distributed.sum_over_ranks(torch.ones(())).item() == 2
    dist.destroy_process_group()


@pytest.mark.distributed
def test_uneven_work_times_nobody_out() -> None:
    mp.spawn(_uneven, (20_002 + os.getpid() % 10_000,), nprocs=2)


def _timeouts(rank: int, world_size: int) -> list[timedelta]:
    """Of the process group, of the one that DeepSpeed makes for ZeRO, and of another that it makes later."""
    groups = [dist.group.WORLD, deepspeed.utils.groups._get_data_parallel_group(), deepspeed.comm.new_group([0, 1])]
    return [group._get_backend(torch.device("cpu")).options._timeout for group in groups]


@pytest.mark.distributed
def test_every_group_outlasts_the_watchdog() -> None:
    expected = timedelta(seconds=HANG_TIMEOUT) + distributed.WATCHDOG_MARGIN
    assert run_on_ranks(_timeouts, 2) == [[expected] * 3] * 2
    assert distributed.collective_timeout(7200) == timedelta(minutes=130)
    assert distributed.collective_timeout(1) == timedelta(minutes=10, seconds=1)
    assert distributed.collective_timeout(0) == distributed.NO_LIMIT
    assert {option.default for option in _hang_timeouts()} == {HANG_TIMEOUT}


def _hang_timeouts() -> list[dataclasses.Field[float]]:
    settings = (SftConfig, SampleConfig, Step2Config, Step3Config, DpoConfig)
    return [option for config in settings for option in dataclasses.fields(config) if option.name == "hang_timeout"]


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
