from __future__ import annotations

import gc
import json
import sys
from dataclasses import replace
from pathlib import Path

import deepspeed
import pytest
import torch
from safetensors.torch import load_file
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

from common.engine.deepspeed_config import inference_config
from common.engine.hybrid import HybridEngine
from common.models.loading import load_fast_tokenizer
from common.models.reward_encoder import RewardEncoder
from common.models.token_reward import load_token_reward_model, load_token_reward_scorer, save_token_reward_model
from common.tracking import read_metrics
from step2_token_reward.config import Step2Config
from step2_token_reward.dataset import build_data
from tests.distributed.kills import run_killed
from tests.distributed.ranks import run_on_ranks
from tests.labelled_samples import RESPONSES, labelled, write_files
from tests.models.reward_fixtures import EAGER, HISTORY, INPUTS, save_tiny
from tests.reward_training import Parts, trainer_of

pytestmark = pytest.mark.distributed


def train(rank: int, world_size: int, flags: list[str]) -> None:
    """Step 2's own command on this rank."""
    from step2_token_reward.main import main

    sys.argv = ["main.py", *flags]
    try:
        main()
    finally:
        unset_hf_deepspeed_config()
        gc.collect()


def flags_for(folder: Path, model: str, samples: str, labels: str, *more: str) -> list[str]:
    return [
        "--model_name_or_path", model, "--samples", samples, "--labels", labels, "--output_dir", str(folder),
        "--prompt_template", "compact", "--max_prompt_tokens", "64", "--max_response_tokens", "48",
        "--attn_implementation", "eager", "--class_weights", "0.5", "1.0", "1.5", "--w", "0.4",
        "--lr_scheduler_type", "constant_with_warmup", "--warmup_ratio", "0", "--max_grad_norm", "0.1",
        "--learning_rate", "1e-2", "--logging_steps", "1", *more,
    ]  # fmt: skip


@pytest.mark.parametrize(("stage", "bidirectional"), [(3, True), (1, False)])
def test_two_ranks_with_accumulation_train_as_one_process_does(tmp_path: Path, stage: int, bidirectional: bool) -> None:
    """2 ranks x 3 micro-batches of one response against one batch of six, AdamW, two steps, then held-out metrics."""
    model = save_tiny("llama", tmp_path / "base")
    start = load_token_reward_model(model, EAGER, bidirectional)
    start.config.classifier_dropout = 0.0
    start.save_pretrained(model)  # the head too: both runs start from the same weights
    rows = labelled("train", RESPONSES) + labelled("dev", RESPONSES[:5])
    samples, labels = write_files(tmp_path, rows)
    more = ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "3", "--max_steps", "2",
            "--per_device_eval_batch_size", "2", "--zero_stage", str(stage),
            "--bidirectional", str(bidirectional).lower()]  # fmt: skip
    run_on_ranks(train, 2, flags_for(tmp_path / "run", model, samples, labels, *more))

    whole = load_token_reward_model(model, EAGER)
    inputs = replace(INPUTS, prefix_attention=bidirectional)  # as auto does for a decoder that reads both ways
    encoder = RewardEncoder(load_fast_tokenizer(model), inputs, whole)
    parts = Parts(whole, encoder, build_data(rows, encoder))
    single = trainer_of(parts, tmp_path / "single", w=0.4, max_steps=2, learning_rate=1e-2, max_grad_norm=0.1)
    single.train()

    logged = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    expected = [row for row in single.state.log_history if "loss" in row]
    assert len(logged) == len(expected) == 2
    for ours, theirs in zip(logged, expected, strict=True):
        for name in ("loss", "local_loss", "global_loss", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3), name
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics == pytest.approx(single.final_metrics(), rel=1e-3)
    scorer = load_token_reward_scorer(str(tmp_path / "run" / "model"), EAGER)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(scorer.module.state_dict()[name], value, rtol=1e-3, atol=1e-4)
    assert scorer.score([HISTORY], RESPONSES[:1]).words
    saved = json.loads((tmp_path / "run" / "model" / "token_reward.json").read_text())
    assert saved["metrics"] == metrics
    assert (saved["w"], saved["class_weights"], saved["bidirectional"]) == (0.4, [0.5, 1.0, 1.5], bidirectional)


def score_sharded(rank: int, world_size: int, folder: str, weights: str) -> tuple[list[list[float]], int]:
    """The scores that a frozen ZeRO-3 model gives this rank's responses, and how many weights the rank holds itself."""
    config = inference_config(Step2Config(zero_stage=3, dtype="fp32", output_dir="unused"), world_size=world_size)
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    sharding = HfDeepSpeedConfig(config)
    try:
        scorer = load_token_reward_scorer(folder, EAGER)
    finally:
        unset_hf_deepspeed_config()
        del sharding
    held = sum(parameter.numel() for parameter in scorer.module.parameters())
    engine, *_ = deepspeed.initialize(model=scorer.module.requires_grad_(False), config=config)
    mine = RESPONSES[rank::world_size]
    with HybridEngine(engine, weights).inference():
        return scorer.score([HISTORY] * len(mine), mine).words, held


@pytest.mark.parametrize("weights", ["gathered", "sharded"])
def test_a_sharded_model_scores_as_a_whole_one(tmp_path: Path, weights: str) -> None:
    base = save_tiny("llama", tmp_path / "base")
    model = load_token_reward_model(base, EAGER, bidirectional=True)
    save_token_reward_model(tmp_path / "model", model, load_fast_tokenizer(base), INPUTS, {})
    whole = load_token_reward_scorer(str(tmp_path / "model"), EAGER)
    outcomes = run_on_ranks(score_sharded, 2, str(tmp_path / "model"), weights)
    for rank, (scores, held) in enumerate(outcomes):
        mine = RESPONSES[rank::2]
        assert held == 0  # the weights were sharded as they were loaded
        expected = whole.score([HISTORY] * len(mine), mine).words
        assert scores == [pytest.approx(words, abs=1e-5) for words in expected]


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("place", "call"), [("trainer_step", 11), ("trainer_manifest", 3)])
def test_killed_under_the_launcher_and_resumed_equals_undisturbed(
    place: str, call: int, straight: list[str], tmp_path: Path
) -> None:
    """SIGKILL in the middle of step 11 of 20, and in the third checkpoint before its manifest."""
    undisturbed, run = Path(straight[straight.index("--output_dir") + 1]), tmp_path / "run"
    flags = [str(run) if flag == str(undisturbed) else flag for flag in straight]
    assert run_killed("step2_token_reward.main", place, call, flags, run) != 0
    run_on_ranks(train, 2, [*flags, "--resume"])
    assert losses(run) == losses(undisturbed) and len(losses(run)) == 20
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (run, undisturbed))
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The flags of a run of 20 steps that nothing disturbs, with dropout and class masks: random states decide."""
    folder = tmp_path_factory.mktemp("step2")
    model = save_tiny("bert", folder / "base")
    load_token_reward_model(model, EAGER).save_pretrained(model)
    samples, labels = write_files(folder, labelled("train", RESPONSES) + labelled("dev", RESPONSES[:2]))
    more = ["--per_device_train_batch_size", "1", "--max_steps", "20", "--save_steps", "4", "--eval_steps", "100",
            "--class_keep_ratios", "0.5", "0.9", "1"]  # fmt: skip
    flags = flags_for(folder / "run", model, samples, labels, *more)
    run_on_ranks(train, 2, flags)
    return flags


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run / "metrics.jsonl") if "loss" in row]
