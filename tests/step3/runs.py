"""Step 3 as a whole on two ranks: its inputs, its command, and ways to run it."""

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

import torch
from safetensors.torch import load_file

from common.config import ModelOptions
from common.data.records import Event, Example
from common.errors import run_command
from common.files import write_jsonl
from common.models.loading import save_model_folder
from common.models.reward_options import RewardInputOptions
from common.models.token_reward import load_token_reward_model, save_token_reward_model
from step3_tppo.main import main
from tests.distributed.ranks import run_on_ranks
from tests.tiny_models import TEXTS, ordinary_tokenizer, tiny_llama

STEPS = 4
WEIGHTS = ("model/model.safetensors", "critic/model.safetensors", "critic/value_head.safetensors")


def write_inputs(folder: Path) -> Path:
    """An actor, a reward model and training examples in `folder`."""
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


def run(inputs: Path, output: Path, *flags: str, ranks: int = 2) -> list[tuple[int, str]]:
    """The command on ranks of the pool, which have imported everything; exit status and standard error of each."""
    argv = command(inputs, output, *flags)
    return run_on_ranks(run_main, ranks, argv[argv.index("step3_tppo/main.py") :])


def run_main(rank: int, world_size: int, argv: list[str]) -> tuple[int, str]:
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


def page_names(output: Path) -> list[str]:
    return sorted(page.name for page in (output / "samples").iterdir())


def ranks_left(output: Path) -> str:
    """Process ids that still work on the run in `output`."""
    return subprocess.run(["pgrep", "-f", f"--output_dir {output}"], capture_output=True, text=True).stdout


def assert_equal_runs(output: Path, straight: Path) -> None:
    """The same metrics and samples of every step, once each, and the same final weights, to the last bit."""
    assert numbers(output) == numbers(straight)
    assert (output / "samples.jsonl").read_text() == (straight / "samples.jsonl").read_text()
    assert page_names(output) == page_names(straight)
    for name in WEIGHTS:
        ours, theirs = load_file(output / name), load_file(straight / name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name
