"""The launchers of the three steps, as a user starts them: tiny models, few updates, on one machine and across two."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from common.files import read_jsonl
from tests.distributed.two_hosts import Hosts, missing, two_hosts
from tests.labelled_samples import RESPONSES, labelled, write_files
from tests.step3.runs import command, environment, numbers, ranks_left, run_successfully, write_inputs

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

STEPS = {1: "step1_sft", 2: "step2_token_reward", 3: "step3_tppo"}
LAUNCHERS = sorted(Path().glob("step*/launch/*.sh"))
# What a launcher's own preset is for, and a tiny model on CPUs is not: the flags of a user win.
OWN = ("--config", "/dev/null")


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
    write_files(folder, labelled("train", RESPONSES * 2) + labelled("dev", RESPONSES))
    return folder


@pytest.fixture(scope="module")
def straight(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """The metrics of step 3 on two ranks without any launcher."""
    output = tmp_path_factory.mktemp("straight") / "run"
    run_successfully(inputs, output)
    return numbers(output)


def flags_of(step: int, inputs: Path, output: Path) -> list[str]:
    """A few updates of a step on tiny models."""
    if step == 3:
        return step3_flags(inputs, output)
    model = ["--model_name_or_path", str(inputs / "actor"), "--output_dir", str(output)]
    amount = ["--max_steps", "2", "--num_queries", "2", "--per_device_train_batch_size", "2", "--max_prompt_tokens"]
    if step == 1:
        return [*model, *amount, "180", "--data_dir", str(inputs / "data")]
    given = ["--samples", str(inputs / "samples.jsonl"), "--labels", str(inputs / "labels.jsonl")]
    return [*model, *amount, "128", *given, "--bidirectional", "true"]


def sample_flags(inputs: Path, output: Path) -> list[str]:
    return [
        "--model_name_or_path", str(inputs / "actor"), "--data_dir", str(inputs / "data"), "--output_dir", str(output),
        "--num_queries", "2", "--max_prompt_tokens", "180", "--max_response_tokens", "8",
    ]  # fmt: skip


def step3_flags(inputs: Path, output: Path, *more: str) -> list[str]:
    whole = command(inputs, output, *more)
    return whole[whole.index("step3_tppo/main.py") + 1 :]


def launch(script: Sequence[str], hosts: Hosts | None = None) -> subprocess.CompletedProcess[str]:
    """The ended command, on the first of two hosts if there are any."""
    words = ["bash", *map(str, script)]
    settings = environment() | {"TPPO_VENV": "none"}
    if hosts is not None:
        words, settings = hosts.command(*words), hosts.environment(settings)
    return subprocess.run(words, env=settings, capture_output=True, text=True, timeout=600, check=False)


def check_output(step: int, output: Path, straight: list[dict[str, float]] | None = None) -> None:
    """A model is there, and step 3 has the numbers of a run without a launcher."""
    assert (output / "model" / "model.safetensors").is_file()
    if step == 3 and straight is not None:
        ours = numbers(output)
        assert len(ours) == len(straight) > 0
        for mine, other in zip(ours, straight, strict=True):
            assert mine.keys() == other.keys()
            for key, value in mine.items():
                assert value == pytest.approx(other[key], rel=1e-5, abs=1e-6, nan_ok=True), key


def test_there_are_four_launchers_a_step_and_one_for_samples() -> None:
    kinds = ["cpu", "multi_node", "single_gpu", "single_node"]
    found = {step: [path.stem for path in LAUNCHERS if path.parts[0] == folder] for step, folder in STEPS.items()}
    assert found == {1: kinds, 2: sorted([*kinds, "sample"]), 3: kinds}


@pytest.mark.parametrize("script", LAUNCHERS, ids=str)
def test_a_launcher_can_be_read_at_a_glance(script: Path) -> None:
    """At most 20 lines, the command in plain sight, every setting of its head used, and the preset's file there."""
    text = script.read_text()
    assert len(text.splitlines()) <= 20
    (line,) = re.findall(r"^launch deepspeed .*", text, re.MULTILINE)
    program = "sample" if script.stem == "sample" else "main"
    assert f'"$ROOT/{script.parts[0]}/{program}.py"' in line and text.rstrip().endswith('"$@"')
    names = re.findall(r"^(\w+)=\$\{\1:-", text, re.MULTILINE)
    assert len(names) >= 4 and all(f'"${name}"' in text or f"/${name}.yaml" in text for name in names)
    (preset,) = re.findall(r"^PRESET=\$\{PRESET:-(\w+)\}$", text, re.MULTILINE)
    recipes = re.findall(r'"\$ROOT/(step\w+/configs/\w+\.yaml)"', text)
    assert len(recipes) == 1 and Path(recipes[0]).is_file() and Path(recipes[0]).with_name(f"{preset}.yaml").is_file()


@pytest.mark.parametrize(
    ("launcher", "ranks"), [("cpu", ()), ("single_gpu", ()), ("single_node", ("--num_gpus", "2"))]
)
@pytest.mark.parametrize("step", STEPS)
def test_a_launcher_on_one_machine(
    step: int, launcher: str, ranks: Sequence[str], inputs: Path, tmp_path: Path, straight: list[dict[str, float]]
) -> None:
    script = f"{STEPS[step]}/launch/{launcher}.sh"
    ended = launch([script, *OWN, *flags_of(step, inputs, tmp_path / "run"), *ranks])
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    # A single rank draws other responses.
    check_output(step, tmp_path / "run", None if launcher == "single_gpu" else straight)


def test_settings_of_the_head_come_from_the_environment_and_a_preset_from_its_file(
    inputs: Path, tmp_path: Path
) -> None:
    settings = f"MODEL={inputs}/actor DATA={inputs}/data OUTPUT={tmp_path}/run PRESET=tiny RANKS=1"
    flags = "--max_steps 1 --num_queries 2 --max_prompt_tokens 180 --no_tensorboard"
    ended = launch(["-c", f"{settings} bash step1_sft/launch/cpu.sh {flags}"])
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    check_output(1, tmp_path / "run")


@pytest.mark.parametrize("step", [*STEPS, "sample"])
def test_a_launcher_across_two_hosts(
    step: int | str, hosts: Hosts, inputs: Path, tmp_path: Path, straight: list[dict[str, float]]
) -> None:
    if step == "sample":
        script, flags = "step2_token_reward/launch/sample.sh", sample_flags(inputs, tmp_path / "run")
    else:
        script, flags = f"{STEPS[step]}/launch/multi_node.sh", flags_of(step, inputs, tmp_path / "run")
    ended = launch([script, *OWN, *flags, "--hostfile", str(hosts.hostfile)], hosts)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    # pdsh marks every line with its host, so that both can be read.
    for address in hosts.addresses:
        assert f"{address}: " in ended.stdout + ended.stderr
    if step == "sample":
        assert len(list(read_jsonl(tmp_path / "run" / "samples.jsonl"))) > 12
    else:
        check_output(step, tmp_path / "run", straight)
    if step == 3:
        AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")


def test_samples_on_one_machine(inputs: Path, tmp_path: Path) -> None:
    ended = launch(["step2_token_reward/launch/sample.sh", *OWN, *sample_flags(inputs, tmp_path / "run")])
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    origins = [row["origin"] for _, row in read_jsonl(tmp_path / "run" / "samples.jsonl")]
    assert origins.count("sample") > 0 and origins.count("gold") > 0


@pytest.mark.parametrize("step", STEPS)
def test_a_hostfile_that_is_missing_is_refused_and_not_replaced_by_this_machine(step: int, tmp_path: Path) -> None:
    script = f"{STEPS[step]}/launch/multi_node.sh"
    ended = launch([script, "--hostfile", str(tmp_path / "hosts"), "--output_dir", str(tmp_path / "run")])
    assert ended.returncode == 2 and not (tmp_path / "run").exists()
    assert ended.stderr.endswith("hosts: no such file; scripts/hostfile.example shows one\n")


def test_a_script_of_a_step_across_two_hosts(hosts: Hosts, inputs: Path, tmp_path: Path) -> None:
    """`run_step3.sh --hostfile` starts the launcher for many machines; a wrong flag is one message from it."""
    script = ["scripts/run_step3.sh", "--preset", "none", "--hostfile", str(hosts.hostfile)]
    ended = launch([*script, *step3_flags(inputs, tmp_path / "run", "--total_steps", "1")], hosts)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    for address in hosts.addresses:
        assert f"{address}: " in ended.stdout + ended.stderr
    ended = launch([*script, *step3_flags(inputs, tmp_path / "wrong", "--clip_rang", "0.2")], hosts)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: unknown argument: --clip_rang 0.2") and ended.stderr.count("\n") == 1


def test_a_rank_that_dies_ends_the_job_on_both_hosts(hosts: Hosts, inputs: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    flags = step3_flags(inputs, output, "--total_steps", "500", "--save_steps", "500")
    script = (
        "source scripts/environment.sh; use_cpu_ranks_without_gpu; launch deepspeed --hostfile "
        '"$0" tests/distributed/killed_main.py step3_tppo.main SIGKILL update 3 1 "$@"'
    )
    ended = launch(["-c", script, str(hosts.hostfile), *flags], hosts)
    assert ended.returncode != 0
    assert "ended without a word" in ended.stderr, ended.stderr[-2000:]
    assert "  rank 1: in update of step 2" in ended.stderr, ended.stderr[-2000:]
    assert not ranks_left(output), "a rank outlived the job"


def test_a_hostfile_of_strangers_is_refused(hosts: Hosts, inputs: Path, tmp_path: Path) -> None:
    stranger = tmp_path / "hostfile"
    stranger.write_text("10.77.255.9 slots=1\n10.77.255.10 slots=1\n")
    script = ["scripts/run_step3.sh", "--preset", "none", "--hostfile", str(stranger)]
    ended = launch([*script, *step3_flags(inputs, tmp_path / "run")], hosts)
    assert ended.returncode != 0 and "was not reachable via ssh" in ended.stderr
