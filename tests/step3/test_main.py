"""Step 3 as a whole on two ranks: killed under the deepspeed launcher and resumed, diverged, and refused."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.config import ModelOptions
from common.data.records import Event, Example
from common.errors import run_command
from common.files import write_jsonl
from common.models.loading import save_model_folder
from common.models.reward_encoder import RewardInputOptions
from common.models.token_reward import load_token_reward_model, save_token_reward_model
from step3_tppo.main import main
from tests.distributed.ranks import run_on_ranks
from tests.tiny_models import TEXTS, ordinary_tokenizer, tiny_llama

pytestmark = pytest.mark.distributed
STEPS = 4


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An actor, a reward model and training examples."""
    folder = tmp_path_factory.mktemp("inputs")
    tokenizer = ordinary_tokenizer()
    save_model_folder(tiny_llama(), tokenizer, folder / "actor", {})
    reward = load_token_reward_model(str(folder / "actor"), ModelOptions(), bidirectional=True)
    save_token_reward_model(folder / "reward", reward, tokenizer, RewardInputOptions("compact", 2, 64, 32), {})
    history = [Event("search", query=text.replace("\n", " ")) for text in TEXTS]
    examples = [
        Example(f"e{i}", f"u{i}", f"u{i}", "test", "train", tuple(history[: 1 + i % 3]), ("red hat", "blue shoes"))
        for i in range(12)
    ]
    write_jsonl(folder / "data" / "train.jsonl", (example.to_dict() for example in examples))
    return folder


def command(inputs: Path, output: Path, *flags: str) -> list[str]:
    return [
        str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--no_local_rank",
        "--master_port", str(20_000 + os.getpid() % 10_000), "step3_tppo/main.py",
        "--actor_path", str(inputs / "actor"), "--reward_path", str(inputs / "reward"),
        "--data_dir", str(inputs / "data"), "--output_dir", str(output), "--prompt_template", "compact",
        "--num_queries", "2", "--max_prompt_tokens", "64", "--max_response_tokens", "8", "--total_steps", str(STEPS),
        "--rollout_batch_size", "4", "--mini_batch_size", "4", "--micro_batch_size", "1", "--scoring_batch_size", "2",
        "--actor_learning_rate", "1e-2", "--critic_learning_rate", "1e-2", "--critic_warmup_steps", "1",
        "--save_steps", "2", "--lr_schedule", "linear", *flags,
    ]


def environment() -> dict[str, str]:
    return os.environ | {
        "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd()),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }


def run(inputs: Path, output: Path, *flags: str) -> list[tuple[int, str]]:
    """The command on two ranks of the pool, which have imported everything; exit status and standard error of each."""
    argv = command(inputs, output, *flags)
    return run_on_ranks(_main, 2, argv[argv.index("step3_tppo/main.py") :])


def _main(rank: int, world_size: int, argv: list[str]) -> tuple[int, str]:
    errors = io.StringIO()
    with mock.patch.object(sys, "argv", argv), contextlib.redirect_stderr(errors):
        try:
            run_command(main)
        except SystemExit as stop:
            return int(stop.code), errors.getvalue()
    return 0, errors.getvalue()


def kill_after(checkpoint: Path, inputs: Path, output: Path, *flags: str) -> None:
    """Start a run and SIGKILL its whole process group once `checkpoint` is there."""
    process = subprocess.Popen(
        command(inputs, output, *flags), env=environment(), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 240
        while not checkpoint.is_dir():
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline, "no checkpoint in 240 s"
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    # The ranks are in their launcher's group; nothing of the run may still write when it is resumed.
    subprocess.run(["pkill", "-KILL", "-f", f"--output_dir {output}"], check=False)
    time.sleep(0.5)


def run_successfully(inputs: Path, output: Path, *flags: str) -> None:
    for status, error in run(inputs, output, *flags):
        assert status == 0, error[-3000:]


def numbers(output: Path) -> list[dict[str, float]]:
    """The metrics of each step but for what a clock measured."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if "second" not in key} for row in rows]


@pytest.mark.timeout(900)
def test_killed_and_resumed_equals_undisturbed(inputs: Path, tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    run_successfully(inputs, straight)

    kill_after(killed / "checkpoints" / "step_00000002", inputs, killed)
    assert not (killed / "model").exists()
    for status, error in run(inputs, killed):
        assert status == 2 and "--resume to go on with it" in error
    run_successfully(inputs, killed, "--resume")

    assert [row["step"] for row in numbers(straight)] == list(range(STEPS))
    assert numbers(killed) == numbers(straight)  # to the last bit
    for name in ("model/model.safetensors", "critic/model.safetensors", "critic/value_head.safetensors"):
        ours, theirs = load_file(killed / name), load_file(straight / name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name

    first, *_, last = numbers(straight)
    assert first["kl/per_sequence"] == 0.0  # the critic warms up, the actor is still the reference
    assert last["kl/per_sequence"] != 0.0
    model = AutoModelForCausalLM.from_pretrained(straight / "model")
    tokenizer = AutoTokenizer.from_pretrained(straight / "model")
    assert model.config.eos_token_id == tokenizer.eos_token_id == 0
    start = load_file(inputs / "actor" / "model.safetensors")
    tuned = load_file(straight / "model" / "model.safetensors")
    assert start.keys() == tuned.keys()
    assert any(not torch.equal(start[key], tuned[key]) for key in start)


@pytest.mark.timeout(600)
def test_lora_in_the_sharded_path_needs_no_reference_and_leaves_adapters(inputs: Path, tmp_path: Path) -> None:
    run_successfully(
        inputs, tmp_path / "lora", "--lora_r", "4", "--hybrid_weights", "sharded", "--reward_level", "query",
        "--total_steps", "2", "--gradient_checkpointing",
    )
    rows = numbers(tmp_path / "lora")
    assert rows[0]["kl/per_sequence"] == 0.0
    assert (tmp_path / "lora" / "model" / "adapter" / "adapter_model.safetensors").is_file()
    AutoModelForCausalLM.from_pretrained(tmp_path / "lora" / "model")


@pytest.mark.timeout(600)
def test_target_kl_ends_the_updates_of_a_rollout(inputs: Path, tmp_path: Path) -> None:
    """Four minibatches a rollout; the first has ratio 1, the second sees the first's update and exceeds any target."""
    flags = ("--rollout_batch_size", "8", "--ppo_epochs", "2", "--total_steps", "2")
    run_successfully(inputs, tmp_path / "free", *flags, "--target_kl", "0")
    run_successfully(inputs, tmp_path / "bound", *flags, "--target_kl", "1e-6")
    free, bound = numbers(tmp_path / "free")[1], numbers(tmp_path / "bound")[1]
    assert (free["policy/optimizer_steps"], free["policy/stopped_early"]) == (4.0, 0.0)
    assert (bound["policy/optimizer_steps"], bound["policy/stopped_early"]) == (2.0, 1.0)


@pytest.mark.timeout(600)
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(inputs: Path, tmp_path: Path) -> None:
    """A critic whose trunk holds a NaN: its first value is not finite."""
    poisoned = tmp_path / "poisoned"
    save_model_folder(tiny_llama(), ordinary_tokenizer(), poisoned, {})
    weights = load_file(poisoned / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, poisoned / "model.safetensors", metadata={"format": "pt"})
    for status, error in run(inputs, tmp_path / "run", "--critic_path", str(poisoned)):
        assert status == 3
        assert "NaN or infinite at step 0" in error
