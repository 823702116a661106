"""Step 3 killed in every place where it hurts, damaged on disk, or out of disk: it goes on as if nothing had been."""

from __future__ import annotations

import resource
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from common.engine.checkpoint import list_checkpoints
from common.engine.manifest import damage
from tests.engine.test_manifest import flip_a_bit
from tests.step3.runs import assert_equal_runs, command, environment, numbers, ranks_left, run, run_successfully

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]
# Samples of steps 0, 9 and 18: those of step 9 are there when a run that is killed in step 11 goes on from step 8.
# Two responses share a prompt.
FLAGS = (
    "--total_steps", "20", "--save_steps", "4", "--sample_steps", "9", "--rollout_batch_size", "2",
    "--samples_per_prompt", "2", "--micro_batch_size", "2",
)  # fmt: skip


@pytest.fixture(scope="module")
def straight(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 20 steps that nothing disturbs."""
    output = tmp_path_factory.mktemp("straight") / "run"
    run_successfully(inputs, output, *FLAGS)
    assert [row["step"] for row in numbers(output)] == list(range(20))
    return output


def run_killed(inputs: Path, output: Path, place: str, call: int, rank: int) -> int:
    """The run under the deepspeed launcher with a rank that kills itself; the launcher's exit status."""
    launch = command(inputs, output, *FLAGS)
    script = launch.index("step3_tppo/main.py")
    killed = ["step3_tppo.main", "SIGKILL", place, str(call), str(rank)]
    launch[script : script + 1] = ["tests/distributed/killed_main.py", *killed]
    ended = subprocess.run(launch, env=environment(), capture_output=True, text=True, timeout=500)
    assert "sends itself SIGKILL" in ended.stderr, ended.stderr[-2000:]  # it did not end for another reason
    assert not ranks_left(output), "the launcher left a rank behind"
    return ended.returncode


@pytest.mark.parametrize(
    ("place", "call", "rank"),
    [
        ("step", 11, 1),  # the beginning of step 11
        ("switch", 22, 0),  # from training to inference and back, several times a step
        ("draw", 85, 1),  # in the middle of a rollout: some eight tokens a step
        ("update", 11, 0),
        ("checkpoint", 4, 1),  # the critic's part of the second checkpoint; the actor's is written
        ("manifest", 2, 0),  # everything is written but the list
        ("rotation", 3, 0),  # the third checkpoint has its name, the first is not removed yet
    ],
)
def test_killed_anywhere_and_resumed_equals_undisturbed(
    place: str, call: int, rank: int, inputs: Path, straight: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    assert run_killed(inputs, output, place, call, rank) != 0
    assert not (output / "model").exists()
    run_successfully(inputs, output, *FLAGS, "--resume")
    assert_equal_runs(output, straight)
    assert not list((output / "checkpoints").glob(".*"))  # nothing half-written stays


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_used(
    inputs: Path, straight: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    shutil.copytree(straight, output)
    shutil.rmtree(output / "model")
    *_, before, newest = list_checkpoints(output / "checkpoints")
    flip_a_bit(max(newest.rglob("*.pt"), key=lambda path: path.stat().st_size))
    run_successfully(inputs, output, *FLAGS, "--resume")
    assert_equal_runs(output, straight)
    assert (output / "checkpoints" / f".damaged_{newest.name}").is_dir()
    assert before in list_checkpoints(output / "checkpoints")


def test_kept_are_the_newest_and_the_best(straight: Path) -> None:
    """The score is the mean reward of the steps since the checkpoint before; the run's rewards decide which is best."""
    scores = [row["reward/score_per_response"] for row in numbers(straight)]
    means = {step: sum(scores[step - 4 : step]) / 4 for step in (4, 8, 12, 16, 20)}
    best = max(means, key=lambda step: (means[step], step))
    names = {f"step_{step:08d}" for step in {16, 20, best}}
    assert {path.name for path in list_checkpoints(straight / "checkpoints")} == names


@pytest.mark.distributed
def test_a_run_goes_on_with_other_pass_sizes_and_not_with_other_data(inputs: Path, tmp_path: Path) -> None:
    begun, output = tmp_path / "inputs", tmp_path / "run"
    shutil.copytree(inputs, begun)
    run_successfully(begun, output, "--total_steps", "2")
    sizes = ["--micro_batch_size", "3", "--scoring_batch_size", "3", "--decode_rows", "2"]
    run_successfully(begun, output, "--total_steps", "4", "--resume", *sizes)
    assert len((output / "metrics.jsonl").read_text().splitlines()) == 4
    data = begun / "data" / "train.jsonl"
    data.write_text("".join(reversed(data.read_text().splitlines(keepends=True))))
    for status, message in run(begun, output, "--total_steps", "4", "--resume"):
        assert status == 2 and "changed since: --data_dir train.jsonl" in message


def test_a_full_disk_ends_the_run_and_leaves_the_last_checkpoint_whole(
    inputs: Path, straight: Path, tmp_path: Path
) -> None:
    """A limit on the size of a file stands for the disk: the write fails alike. The metrics stay far below it."""
    output = tmp_path / "run"
    assert run_killed(inputs, output, "step", 11, 0) != 0
    launch = command(inputs, output, *FLAGS, "--resume")
    ended = subprocess.run(
        launch, env=environment(), capture_output=True, text=True, timeout=300, preexec_fn=_limit_files
    )
    assert ended.returncode == 4, ended.stderr[-2000:]
    assert "could not be written" in ended.stderr and "is the disk full?" in ended.stderr
    assert "step_00000008 is untouched: make room, then --resume" in ended.stderr
    assert list_checkpoints(output / "checkpoints")[-1].name == "step_00000008"
    run_successfully(inputs, output, *FLAGS, "--resume")
    assert_equal_runs(output, straight)


def _limit_files() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))


def test_another_number_of_ranks_reads_the_converted_checkpoint(inputs: Path, straight: Path, tmp_path: Path) -> None:
    """Refused at first, with the command that converts; then it goes on, and what is done stays as it is."""
    output = tmp_path / "run"
    shutil.copytree(straight, output)
    shutil.rmtree(output / "model")
    newest, before = (output / "checkpoints" / f"step_{step:08d}" for step in (20, 16))
    shutil.rmtree(newest)
    flags = [*FLAGS, "--resume"]
    ((status, error),) = run(inputs, output, *flags, ranks=1)
    assert status == 2 and "written by 2 ranks, but 1 are running" in error
    script = error.split("bash ")[1].split()
    converted = subprocess.run(
        ["bash", *script], env=environment() | {"TPPO_VENV": "none"}, capture_output=True, text=True, timeout=300
    )
    assert converted.returncode == 0 and "actor_universal, critic_universal" in converted.stdout, converted.stderr
    assert damage(before) == []  # the new files are in its manifest
    ((status, error),) = run(inputs, output, *flags, ranks=1)
    assert status == 0, error
    ours, theirs = numbers(output), numbers(straight)
    assert ours[:16] == theirs[:16] and [row["step"] for row in ours] == list(range(20))
    for name in ("policy/learning_rate", "kl/coef"):
        assert [row[name] for row in ours] == pytest.approx([row[name] for row in theirs])
