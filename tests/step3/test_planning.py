"""The plan at the start of step 3: a run that cannot fit is stopped before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch

from common.errors import InputError
from step3_tppo.config import Step3Config
from step3_tppo.planning import check_memory
from tests.distributed.ranks import run_on_ranks
from tests.step3.runs import command, run_main

MIB = 2**20
CPU = torch.device("cpu")


def _config(inputs: Path, plan: str = "stop", actor: str = "actor") -> Step3Config:
    return Step3Config(
        actor_path=str(inputs / actor), reward_path=str(inputs / "reward"), data_dir=str(inputs / "data"),
        output_dir=str(inputs / "nowhere"), max_prompt_tokens=64, max_response_tokens=8, rollout_batch_size=4,
        mini_batch_size=4, micro_batch_size=4, plan=plan,
    )  # fmt: skip


def _main_without_memory(rank: int, world_size: int, argv: list[str]) -> tuple[int, str, bool]:
    """Exit status, standard error, and whether models were asked for, where each rank has a MiB."""
    with (
        mock.patch("step3_tppo.planning.free_bytes", return_value=MIB),
        mock.patch("step3_tppo.main.build_models") as build,
    ):
        return (*run_main(rank, world_size, argv), build.called)


@pytest.mark.distributed
def test_a_run_that_cannot_fit_ends_before_it_loads_or_writes_anything(inputs: Path, tmp_path: Path) -> None:
    argv = command(inputs, tmp_path / "run")
    for status, error, built in run_on_ranks(_main_without_memory, 2, argv[argv.index("step3_tppo/main.py") :]):
        assert status == 2 and not built
        assert "takes more memory than there is" in error.splitlines()[-1] and "--plan warn" in error.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_the_message_says_the_peak_what_there_is_and_what_to_add(inputs: Path) -> None:
    with mock.patch("step3_tppo.planning.free_bytes", return_value=2 * MIB), pytest.raises(InputError) as refused:
        check_memory(_config(inputs), CPU)
    message = str(refused.value)
    assert "MiB a rank: does not fit; add --" in message and "scripts/plan.py" in message


def test_warn_goes_on_and_off_says_nothing(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch("step3_tppo.planning.free_bytes", return_value=MIB):
        check_memory(_config(inputs, "warn"), CPU)
        assert "warning: this run takes more memory" in capsys.readouterr().out
        check_memory(_config(inputs, "off"), CPU)
        assert capsys.readouterr().out == ""


def test_a_run_that_fits_says_so_in_a_line(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_memory(_config(inputs), CPU)
    said = capsys.readouterr().out
    assert said.startswith("memory plan: peak") and said.endswith("a rank: fits\n") and said.count("\n") == 1


def test_a_model_that_cannot_be_planned_does_not_stop_a_run(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_memory(_config(inputs, actor="not_there"), CPU)
    said = capsys.readouterr().out
    assert said.startswith("memory plan: none, InputError") and said.count("\n") == 1
