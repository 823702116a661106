"""The real launcher on two hosts: `run_stepN.sh --hostfile`, deepspeed, pdsh, ssh, ZeRO-3 across both."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.distributed.two_hosts import Hosts, missing, two_hosts
from tests.labelled_samples import RESPONSES, labelled, write_files
from tests.step3.runs import command, environment, numbers, ranks_left, run_successfully, write_inputs

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    if reason := missing():
        pytest.skip(f"two hosts: {reason}")
    with two_hosts(tmp_path_factory.mktemp("hosts")) as made:
        yield made


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_inputs(tmp_path_factory.mktemp("inputs"))
    rows = (folder / "data" / "train.jsonl").read_text()
    (folder / "data" / "dev.jsonl").write_text(rows)
    samples = labelled("train", RESPONSES * 2) + labelled("dev", RESPONSES)
    write_files(folder, samples)
    return folder


def launch(hosts: Hosts, step: int, *flags: str) -> subprocess.CompletedProcess[str]:
    script = ["bash", f"scripts/run_step{step}.sh", "--hostfile", str(hosts.hostfile), *flags]
    return subprocess.run(
        hosts.command(*script), env=hosts.environment(environment()), capture_output=True,
        text=True, timeout=400,
    )  # fmt: skip


def step3_flags(inputs: Path, output: Path, *more: str) -> list[str]:
    whole = command(inputs, output, *more)
    return whole[whole.index("step3_tppo/main.py") + 1 :]


def numbers_close(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> None:
    assert len(ours) == len(theirs) > 0
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for key, value in mine.items():
            assert value == pytest.approx(other[key], rel=1e-5, abs=1e-6, nan_ok=True), key


def test_step_3_across_two_hosts_equals_two_ranks_on_one(hosts: Hosts, inputs: Path, tmp_path: Path) -> None:
    run_successfully(inputs, tmp_path / "one_host")
    ended = launch(hosts, 3, *step3_flags(inputs, tmp_path / "two_hosts"))
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    numbers_close(numbers(tmp_path / "two_hosts"), numbers(tmp_path / "one_host"))
    # pdsh marks every line with its host, so that both can be read.
    for address in hosts.addresses:
        assert f"{address}: " in ended.stdout + ended.stderr
    AutoModelForCausalLM.from_pretrained(tmp_path / "two_hosts" / "model")


def test_steps_1_and_2_across_two_hosts(hosts: Hosts, inputs: Path, tmp_path: Path) -> None:
    first = launch(
        hosts, 1, "--model_name_or_path", str(inputs / "actor"), "--data_dir", str(inputs / "data"), "--output_dir",
        str(tmp_path / "sft"), "--num_queries", "2", "--max_prompt_tokens", "180", "--max_steps", "2",
        "--per_device_train_batch_size", "2",
    )  # fmt: skip
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    second = launch(
        hosts, 2, "--model_name_or_path", str(inputs / "actor"), "--samples", str(inputs / "samples.jsonl"), "--labels",
        str(inputs / "labels.jsonl"), "--output_dir", str(tmp_path / "reward"), "--max_steps", "2", "--bidirectional",
        "true", "--num_queries", "2", "--max_prompt_tokens", "128", "--per_device_train_batch_size", "2",
    )  # fmt: skip
    assert second.returncode == 0, second.stdout[-3000:] + second.stderr[-3000:]
    for folder in ("sft", "reward"):
        assert (tmp_path / folder / "model" / "model.safetensors").is_file()


def test_a_rank_that_dies_ends_the_job_on_both_hosts(hosts: Hosts, inputs: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    flags = step3_flags(inputs, output, "--total_steps", "500", "--save_steps", "500")
    script = (
        "source scripts/environment.sh; use_cpu_ranks_without_gpu; "
        'launch tests/distributed/killed_main.py --hostfile "$0" step3_tppo.main SIGKILL update 3 1 "$@"'
    )
    begun = time.monotonic()
    ended = subprocess.run(
        hosts.command("bash", "-c", script, str(hosts.hostfile), *flags), env=hosts.environment(environment()),
        capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert ended.returncode != 0
    assert time.monotonic() - begun < 120
    assert "ended without a word" in ended.stderr, ended.stderr[-2000:]
    assert "  rank 1: in update of step 2" in ended.stderr, ended.stderr[-2000:]
    assert not ranks_left(output), "a rank outlived the job"


def test_a_wrong_flag_is_one_message_from_the_launcher_host(hosts: Hosts, inputs: Path, tmp_path: Path) -> None:
    ended = launch(hosts, 3, *step3_flags(inputs, tmp_path / "run", "--clip_rang", "0.2"))
    assert ended.returncode == 2
    assert "unknown argument: --clip_rang" in ended.stderr and "Traceback" not in ended.stderr


def test_a_hostfile_of_strangers_is_refused(hosts: Hosts, inputs: Path, tmp_path: Path) -> None:
    stranger = tmp_path / "hostfile"
    stranger.write_text("10.77.255.9 slots=1\n10.77.255.10 slots=1\n")
    script = ["bash", "scripts/run_step3.sh", "--hostfile", str(stranger), *step3_flags(inputs, tmp_path / "run")]
    ended = subprocess.run(
        hosts.command(*script), env=hosts.environment(environment()), capture_output=True,
        text=True, timeout=100,
    )  # fmt: skip
    assert ended.returncode != 0 and "was not reachable via ssh" in ended.stderr
