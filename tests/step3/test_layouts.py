"""Whole runs with prompts shared among their responses, beside the same runs with padded rows."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.ranks import run_on_ranks
from tests.step3.runs import command, numbers, run_main, run_successfully

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

# One mini-batch a rollout: the layouts then learn from the same responses at a time.
SHAPE = (
    "--samples_per_prompt", "3", "--mini_batch_size", "12", "--micro_batch_size", "3", "--scoring_batch_size", "6",
    "--critic_warmup_steps", "0", "--total_steps", "2", "--max_kl", "0", "--tensorboard", "false",
)  # fmt: skip
SETTINGS = {
    "zero_0": ("--zero_stage", "0"),
    "zero_1": ("--zero_stage", "1", "--micro_batch_size", "4"),  # cuts groups
    "zero_2": ("--zero_stage", "2", "--temperature", "0.7"),
    "zero_3": ("--micro_batch_tokens", "200", "--scoring_batch_tokens", "100", "--gradient_checkpointing"),
    "zero_3_sharded": ("--hybrid_weights", "sharded", "--micro_batch_size", "2"),
    "lora": ("--lora_r", "4", "--critic_lora_r", "4", "--kl_in", "loss", "--kl_estimator", "k2"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_sharing_prompts_changes_nothing_but_rounding(inputs: Path, tmp_path: Path, name: str) -> None:
    for layout in ("padded", "shared"):
        run_successfully(inputs, tmp_path / layout, *SHAPE, *SETTINGS[name], "--sequence_layout", layout)
    padded, shared = (numbers(tmp_path / layout) for layout in ("padded", "shared"))
    for before, after in zip(padded, shared, strict=True):
        assert before.keys() == after.keys()
        for key, value in before.items():
            if key != "rollout/token_imbalance" and not key.startswith("rollout/mismatch"):
                # Two AdamW steps of a hundredth each: rounding of the gradients comes out at 1e-3.
                assert after[key] == pytest.approx(value, rel=2e-3, abs=2e-4), key
    for file in ("model/model.safetensors", "critic/model.safetensors"):
        one, other = (load_file(tmp_path / layout / file) for layout in ("padded", "shared"))
        error = max(float((one[key] - other[key]).abs().max()) for key in one)
        assert error < 2e-3, (file, error)


def _without_masks_for_eager(rank: int, world_size: int, argv: list[str]) -> tuple[int, str]:
    """Exit status and standard output."""
    printed = io.StringIO()
    with mock.patch("common.models.layouts.MASKED_KERNELS", ("sdpa",)), contextlib.redirect_stdout(printed):
        status, _ = run_main(rank, world_size, argv)
    return status, printed.getvalue()


def test_a_model_that_cannot_share_prompts_reads_them_padded_and_says_so(inputs: Path, tmp_path: Path) -> None:
    flags = (*SHAPE, "--attn_implementation", "eager", "--zero_stage", "1", "--total_steps", "1")
    argv = command(inputs, tmp_path / "run", *flags)
    ended = run_on_ranks(_without_masks_for_eager, 2, argv[argv.index("step3_tppo/main.py") :])
    said = "every prompt is read once for each of its responses: eager takes no mask"
    assert [(status, printed.count(said)) for status, printed in ended] == [(0, 1), (0, 0)], ended


@pytest.mark.parametrize(("setting", "ratio_is_one"), [("auto", True), ("sampled", False)])
def test_the_first_mini_batch_gives_its_own_old_log_probs_in_bf16(
    inputs: Path, tmp_path: Path, setting: str, ratio_is_one: bool
) -> None:
    """Decoding rounds otherwise than a pass in bf16, so that its log-probs give ratios beside 1."""
    flags = (*SHAPE, "--dtype", "bf16", "--total_steps", "1", "--old_logprobs", setting)
    run_successfully(inputs, tmp_path / "run", *flags)
    (row,) = numbers(tmp_path / "run")
    assert (row["policy/max_ratio"] == 1.0 and row["policy/approx_kl"] == 0.0) == ratio_is_one
    assert row["rollout/mismatch_max"] > 0


def test_old_log_probs_of_further_mini_batches_are_recomputed(inputs: Path, tmp_path: Path) -> None:
    """With a learning rate of 0 every ratio is 1: what comes of a pass like the training's, or of that very pass."""
    flags = (
        *SHAPE, "--dtype", "bf16", "--mini_batch_size", "6", "--ppo_epochs", "2", "--actor_learning_rate", "0",
        "--target_kl", "0", "--micro_batch_size", "3", "--scoring_batch_size", "3",
    )  # fmt: skip
    run_successfully(inputs, tmp_path / "run", *flags)
    for row in numbers(tmp_path / "run"):
        assert row["policy/optimizer_steps"] == 4
        # Blocks of other rows have other padding, which bf16 rounds otherwise.
        assert row["policy/max_ratio"] == pytest.approx(1.0, abs=0.1)
        assert torch.tensor(row["policy/entropy"]).isfinite()
