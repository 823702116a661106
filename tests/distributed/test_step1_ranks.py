"""Step 1 as a whole on two ranks: the gradients of one, resumed, killed under the launcher, and on other ranks."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from common.data.prompt_settings import load_prompt_settings
from common.data.prompts import PromptBuilder
from common.engine.manifest import MANIFEST
from common.engine.universal import convert
from common.errors import InputError
from common.files import write_jsonl
from common.tracking import read_metrics
from step1_sft.dataset import build_rows
from step1_sft.main import main
from tests.distributed.kills import run_killed
from tests.distributed.ranks import run_on_ranks
from tests.engine.test_manifest import flip_a_bit
from tests.test_step1 import example, make_trainer
from tests.tiny_models import ordinary_tokenizer, tiny_llama

pytestmark = pytest.mark.distributed
WORDS = ["hat", "shoes", "grinder", "bicycle", "price"]
EXAMPLES = [example(i, (f"blue {WORDS[i % 5]}", f"{WORDS[i % 3]} " * (1 + i % 4))) for i in range(12)]


def run_main(rank: int, world_size: int, arguments: list[str]) -> str:
    """Step 1's command as this rank; returns its error, if it has one."""
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", ["main.py", *arguments])
            main()
    except InputError as error:
        return str(error)
    finally:
        unset_hf_deepspeed_config()  # other tests share these processes
        gc.collect()
    return ""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model and data."""
    folder = tmp_path_factory.mktemp("step1")
    tiny_llama(initializer_range=0.05).save_pretrained(folder / "base")
    ordinary_tokenizer().save_pretrained(folder / "base")
    write_jsonl(folder / "data" / "train.jsonl", (item.to_dict() for item in EXAMPLES))
    write_jsonl(folder / "data" / "dev.jsonl", (item.to_dict() for item in EXAMPLES[:3]))
    return folder


def arguments(inputs: Path, output: Path, *more: str) -> list[str]:
    given = {
        "model_name_or_path": inputs / "base", "data_dir": inputs / "data", "output_dir": output,
        "num_queries": 2, "max_prompt_tokens": 180, "learning_rate": 1e-2, "prompt_loss_weight": 0.5,
        "num_train_epochs": 1, "save_steps": 2, "eval_steps": 2, "logging_steps": 1, "warmup_ratio": 0,
    }  # fmt: skip
    return [f"--{key}={value}" for key, value in given.items()] + list(more)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(run / "model").state_dict()


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run / "metrics.jsonl") if "loss" in row]


TWO_RANKS = ("--per_device_train_batch_size=1", "--gradient_accumulation_steps=2")


def test_two_ranks_with_zero_3_equal_one_without_and_resume_equals_a_straight_run(inputs: Path, tmp_path: Path) -> None:
    run = tmp_path / "two"
    two_ranks = arguments(inputs, run, *TWO_RANKS)
    assert run_on_ranks(run_main, 2, two_ranks) == ["", ""]
    builder = PromptBuilder(ordinary_tokenizer(), "plain", max_prompt_tokens=180, num_queries=2)
    whole = make_trainer(
        tmp_path / "whole", tiny_llama(initializer_range=0.05), rows=build_rows(EXAMPLES, builder, 64).rows,
        per_device_train_batch_size=4, lr_scheduler_type="cosine", max_grad_norm=1.0, seed=0, prompt_loss_weight=0.5,
    )  # fmt: skip
    whole.train()
    final, logged = weights(run), losses(run)
    for name, weight in whole.model.state_dict().items():
        assert torch.allclose(final[name], weight, atol=1e-5), name
    history = EXAMPLES[0].history
    recorded = load_prompt_settings(run / "model")
    assert recorded.builder(ordinary_tokenizer()).ids(history) == builder.ids(history)
    served = AutoTokenizer.from_pretrained(run / "model")
    request = [{"role": "user", "content": builder.text(history)}]
    assert served.apply_chat_template(request, return_dict=False) == builder.ids(history)
    assert len(logged) == 3 and logged[-1] < logged[0]
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in rows if "eval_perplexity" in row] == [0, 2, 3]  # 0: the base model
    assert json.loads((run / "timings.json").read_text())["step1_sft"] > 0

    assert all("--resume" in error for error in run_on_ranks(run_main, 2, two_ranks))
    # As if killed while it wrote the last checkpoint; the one before it is from the middle of the epoch.
    shutil.rmtree(run / "model")
    checkpoints = run / "checkpoints"
    (checkpoints / "checkpoint-3" / MANIFEST).unlink()
    assert run_on_ranks(run_main, 2, [*two_ranks, "--resume"]) == ["", ""]
    assert all(torch.equal(final[name], weight) for name, weight in weights(run).items())
    # And as if the disk had changed a bit of it since.
    shutil.rmtree(run / "model")
    flip_a_bit(max((checkpoints / "checkpoint-3").rglob("*.pt"), key=lambda path: path.stat().st_size))
    assert run_on_ranks(run_main, 2, [*two_ranks, "--resume"]) == ["", ""]
    names = sorted(path.name for path in checkpoints.iterdir())
    assert names == [".damaged_checkpoint-3", "checkpoint-2", "checkpoint-3"]
    assert all(torch.equal(final[name], weight) for name, weight in weights(run).items())
    assert losses(run) == logged

    # And as if one of two machines were gone: the checkpoint of two ranks is converted for one.
    shutil.rmtree(run / "model")
    shutil.rmtree(checkpoints / "checkpoint-3")
    other = arguments(inputs, run, "--resume", "--per_device_train_batch_size=1", "--gradient_accumulation_steps=3")
    (error,) = run_on_ranks(run_main, 1, other)
    assert "4 sequences an optimiser step" in error and "1 x 1 x 3 = 3" in error
    one_rank = arguments(inputs, run, "--resume", "--per_device_train_batch_size=2", "--gradient_accumulation_steps=2")
    (error,) = run_on_ranks(run_main, 1, one_rank)
    assert f"scripts/convert_checkpoint.sh --checkpoint {checkpoints / 'checkpoint-2'}" in error
    convert(checkpoints / "checkpoint-2")
    assert run_on_ranks(run_main, 1, one_rank) == [""]
    # Sums over ranks in another order: a last step of size 1e-2 on sums that differ in their last bits.
    for name, weight in weights(run).items():
        assert torch.allclose(final[name], weight, atol=1e-5), name
    assert losses(run) == pytest.approx(logged, rel=1e-5)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("place", "call"), [("trainer_step", 21), ("trainer_manifest", 3)])
def test_killed_under_the_launcher_and_resumed_equals_undisturbed(
    place: str, call: int, inputs: Path, straight: Path, tmp_path: Path
) -> None:
    """SIGKILL in the middle of step 11 of 20 (two micro-batches a step), and in a checkpoint before its manifest."""
    run = tmp_path / "run"
    flags = arguments(inputs, run, *TWENTY_STEPS)
    assert run_killed("step1_sft.main", place, call, flags, run) != 0
    assert run_on_ranks(run_main, 2, [*flags, "--resume"]) == ["", ""]
    assert losses(run) == losses(straight) and len(losses(run)) == 20
    final = weights(straight)
    assert all(torch.equal(final[name], weight) for name, weight in weights(run).items())


TWENTY_STEPS = (*TWO_RANKS, "--max_steps=20", "--save_steps=4", "--eval_steps=100")


@pytest.fixture(scope="module")
def straight(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 20 steps that nothing disturbs."""
    run = tmp_path_factory.mktemp("straight") / "run"
    assert run_on_ranks(run_main, 2, arguments(inputs, run, *TWENTY_STEPS)) == ["", ""]
    return run
