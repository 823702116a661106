"""What a plan makes of a reward model that reads a history once for all its responses, or with prefix attention."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForTokenClassification, LlamaConfig

from common.engine.memory import GIB
from common.files import write_json
from common.models.layouts import lay_out
from common.models.reward_encoder import prefix_mask
from common.models.sequences import pad_sequences
from common.models.token_reward import SETTINGS_NAME, logits_of_rows, token_classifier_skeleton
from common.planning.models import ModelSpec, meta_model
from common.planning.passes import Rows, classifier_inputs, classifier_pass
from common.planning.plan import Machine, Phase
from step2_token_reward.attention import settle_attention
from step2_token_reward.config import Step2Config
from step2_token_reward.planning import plan_step2
from step3_tppo.config import Step3Config
from step3_tppo.planning import plan_step3
from tests.families import ACTORS, REWARDS, family_config
from tests.planning.memory import allocated_peak
from tests.tiny_models import tiny_llama

LAYERS, WIDTH, INNER, HEAD, KEYS = 3, 64, 128, 16, 2 * 16  # of two heads of keys, four of queries
SIZES = {
    "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "max_position_embeddings": 512
}  # fmt: skip
PROMPT, RESPONSE, SAMPLES = 200, 20, 4


@pytest.fixture
def llama(tmp_path: Path) -> LlamaConfig:
    """A decoder's configuration; saved in `tmp_path`."""
    config = tiny_llama(**SIZES).config
    config.save_pretrained(tmp_path)
    return config


def classifier(config: LlamaConfig, bidirectional: bool, kernel: str = "sdpa") -> torch.nn.Module:
    config.num_labels, config.is_causal = 3, not bidirectional
    return AutoModelForTokenClassification.from_config(config, attn_implementation=kernel).eval()


def flops_of(rows: int, length: int) -> int:
    """Products of weights with tokens, and of all queries with all keys and values, of a row of `length`."""
    weights = 2 * WIDTH * WIDTH + 2 * WIDTH * KEYS + 3 * WIDTH * INNER
    attention = 2 * length**2 * (2 * WIDTH)
    return rows * (LAYERS * (2 * length * weights + attention) + 2 * length * WIDTH * 3)


@pytest.mark.parametrize("prefix", [False, True], ids=["causal", "prefix"])
def test_a_shared_history_counts_once(llama: LlamaConfig, tmp_path: Path, prefix: bool) -> None:
    spec = ModelSpec(str(tmp_path), "token_classifier", bidirectional=prefix)
    shared, padded = (
        classifier_pass(spec, Rows(8, PROMPT, RESPONSE, samples), prefix) for samples in (SAMPLES, 1)
    )
    assert shared.flops == flops_of(2, PROMPT + SAMPLES * RESPONSE)
    assert padded.flops == flops_of(8, PROMPT + RESPONSE)
    assert shared.peak < 0.5 * padded.peak  # 560 tokens in place of 1,760


@pytest.mark.parametrize(("kernel", "responses"), [("sdpa", 32), ("eager", 32), ("eager", 1)])
@pytest.mark.parametrize("prefix", [False, True], ids=["causal", "prefix"])
@torch.no_grad()
def test_a_shared_pass_takes_what_torchs_allocator_gives_it(
    llama: LlamaConfig, tmp_path: Path, prefix: bool, kernel: str, responses: int
) -> None:
    model = classifier(llama, prefix, kernel)
    prompts = [[5] * PROMPT] * responses
    batch = pad_sequences(prompts, [[6] * RESPONSE] * responses, 1, torch.device("cpu"), SAMPLES)
    rows = lay_out(batch, "shared", at_tokens=True)

    def score() -> None:
        logits_of_rows(model, rows, prefix)

    score()
    spec = ModelSpec(str(tmp_path), "token_classifier", eager=kernel == "eager", bidirectional=prefix)
    planned = classifier_pass(spec, Rows(responses, PROMPT, RESPONSE, SAMPLES), prefix).peak
    assert planned == pytest.approx(allocated_peak(score), rel=0.02)


@pytest.mark.parametrize(("eager", "dtype", "size"), [(False, "fp32", 1), (True, "fp32", 4), (True, "bf16", 2)])
def test_a_prefix_mask_has_an_entry_for_each_pair_of_tokens(
    llama: LlamaConfig, tmp_path: Path, eager: bool, dtype: str, size: int
) -> None:
    """A boolean, or what eager attention adds to its logits."""
    model = meta_model(ModelSpec(str(tmp_path), "token_classifier", dtype, eager, bidirectional=True))
    mask = classifier_inputs(model, Rows(8, PROMPT, RESPONSE), prefix_attention=True)["attention_mask"]
    assert mask.shape == (8, 1, 220, 220) and mask.nbytes == 8 * 220 * 220 * size


def training(folder: Path, micro_batches: int, kernel: str = "sdpa") -> int:
    """Bytes of activations and inputs of an optimiser step of step 2, planned for one rank."""
    config = Step2Config(
        model_name_or_path=str(folder), prefix_attention="auto", max_prompt_tokens=PROMPT, max_response_tokens=RESPONSE,
        per_device_train_batch_size=8, gradient_accumulation_steps=micro_batches, dtype="fp32",
        attn_implementation=kernel,
    )  # fmt: skip
    return plan_step2(config, Machine(1, GIB)).phases[1].parts["activations"]


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_training_with_prefix_attention_takes_what_torchs_allocator_gives_it(
    llama: LlamaConfig, tmp_path: Path, kernel: str
) -> None:
    model = classifier(llama, True, kernel).train()
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    segments = (torch.arange(220) >= PROMPT).long().expand(8, -1)

    def train() -> None:
        batches = [
            {"input_ids": torch.full((8, 220), 5), "attention_mask": prefix_mask(segments, kernel, torch.float32)}
            for _ in range(3)
        ]
        model(**batches[0]).logits.float().sum().backward()

    train()
    assert training(tmp_path, 3, kernel) == pytest.approx(allocated_peak(train), rel=0.02)


def test_step_2_holds_the_masks_of_all_micro_batches_of_an_optimiser_step(llama: LlamaConfig, tmp_path: Path) -> None:
    ids, mask = 8 * 220 * 8, 8 * 220 * 220
    assert training(tmp_path, 3) - training(tmp_path, 1) == 2 * (ids + mask)


def reward_scoring(folder: Path, config: LlamaConfig, prefix: bool = False, **settings: object) -> Phase:
    """The phase of step 3's plan in which a reward model, saved in `folder`, reads 32 responses at a time of 128."""
    config.save_pretrained(folder / "reward")
    limits = {"max_prompt_tokens": PROMPT, "max_response_tokens": RESPONSE, "prefix_attention": prefix}
    inputs = {"prompt_template": "plain", "num_queries": 3, **limits}
    write_json(folder / "reward" / SETTINGS_NAME, {"inputs": inputs})
    step3 = Step3Config(
        actor_path=str(folder), reward_path=str(folder / "reward"), data_dir="-", output_dir="-", dtype="fp32",
        max_prompt_tokens=64, max_response_tokens=8, rollout_batch_size=32, mini_batch_size=32,
        samples_per_prompt=SAMPLES, scoring_batch_size=34, **settings,
    )  # fmt: skip
    plan = plan_step3(step3, Machine(1, GIB, flops=1.0))
    return next(phase for phase in plan.phases if phase.name == "reward scoring")


@pytest.mark.parametrize(("is_causal", "prefix"), [(True, False), (False, True)], ids=["causal", "prefix"])
def test_step_3_reads_each_history_once_in_a_reward_model_that_can(
    llama: LlamaConfig, tmp_path: Path, is_causal: bool, prefix: bool
) -> None:
    llama.is_causal = is_causal
    found = reward_scoring(tmp_path, llama, prefix)
    assert found.seconds == 4 * flops_of(8, PROMPT + SAMPLES * RESPONSE)
    padded = reward_scoring(tmp_path, llama, prefix, sequence_layout="padded")
    assert padded.seconds == 4 * flops_of(32, PROMPT + RESPONSE)
    assert found.parts["activations"] < 0.5 * padded.parts["activations"]


def test_step_3_reads_it_with_each_response_in_one_that_reads_both_ways(llama: LlamaConfig, tmp_path: Path) -> None:
    llama.is_causal = False
    assert reward_scoring(tmp_path, llama).seconds == 4 * flops_of(32, PROMPT + RESPONSE)


@pytest.mark.parametrize(
    ("family", "bidirectional", "kernel", "settled"),
    [
        (ACTORS["llama"], "auto", "sdpa", (True, True)),
        (ACTORS["llama"], "auto", "flash_attention_2", (True, False)),
        (ACTORS["llama"], "false", "sdpa", (False, False)),  # shares without it
        (ACTORS["mistral"], "auto", "sdpa", (True, False)),  # has a window
        (REWARDS["bert"], "auto", "sdpa", (False, False)),  # an encoder that could, but would lose accuracy
        (REWARDS["roberta"], "auto", "sdpa", (False, False)),
    ],
)
def test_auto_stands_for_what_the_model_can(
    family: object, bidirectional: str, kernel: str, settled: tuple[bool, bool], tmp_path: Path
) -> None:
    family_config(family).save_pretrained(tmp_path)
    config = Step2Config(
        model_name_or_path=str(tmp_path), bidirectional=bidirectional, prefix_attention="auto",
        attn_implementation=kernel,
    )  # fmt: skip
    skeleton = token_classifier_skeleton(str(tmp_path), config)
    assert settle_attention(config, skeleton) == settled
    for forced in ("true", "false"):
        given = dataclasses.replace(config, prefix_attention=forced)
        assert settle_attention(given, skeleton).prefix == (forced == "true")
