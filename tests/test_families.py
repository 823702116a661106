"""Every family through all three steps, two updates each, with tokenizers of different kinds on the two sides."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForTokenClassification, PreTrainedModel

from common.config import LoraOptions, ModelOptions
from common.errors import InputError
from common.files import read_jsonl
from common.models.loading import (
    apply_lora,
    has_attention,
    load_causal_lm,
    load_tokenizer,
    save_model_folder,
    without_dropout,
)
from common.models.reward_encoder import RewardEncoder
from common.models.reward_options import RewardInputOptions
from common.models.token_reward import SETTINGS_NAME, load_token_reward_model, token_classifier_skeleton
from common.models.value_model import VALUE_HEAD_NAME
from common.tracking import read_metrics
from step3_tppo.config import Step3Config
from tests.distributed.ranks import run_on_ranks
from tests.families import (
    ACTORS,
    PROBE,
    REWARDS,
    Family,
    family_config,
    reward_flags,
    run_steps,
    sample_flags,
    save_family,
    sft_flags,
    tppo_flags,
    write_data,
)
from tests.tokenizer_factory import ALL

# Whose words each actor's are, with another kind of tokenizer than the actor's.
JUDGES = {
    "llama": "bert", "mistral": "longformer", "qwen2": "deberta-v2", "qwen2, some layers with a window": "xlm-roberta",
    "qwen3": "bert", "gemma": "modernbert", "gemma2": "deberta-v2", "gemma3_text": "roberta", "phi": "xlm-roberta",
    "phi3": "modernbert", "gpt_neox": "longformer", "opt": "deberta-v2", "opt, narrow embeddings": "bert",
    "gpt2": "roberta", "granite": "xlm-roberta",
}  # fmt: skip
NO_TOKEN_CLASSIFIER = ["gemma3_text", "opt", "opt, narrow embeddings", "granite"]
SINGLE_PROCESS = 1


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Examples, labelled samples, and each encoder with step 2 behind it under `judges/`."""
    folder = write_data(tmp_path_factory.mktemp("families"))
    for name, family in REWARDS.items():
        save_family(family, folder / "bases" / name)
        flags = reward_flags(folder, folder / "bases" / name, folder / "judges" / name, family.kernel)
        assert run_on_ranks(run_steps, SINGLE_PROCESS, [("step2_token_reward.main", flags)]) == [[]]
    return folder


def assert_finite_losses(rows: list[dict[str, float]], names: list[str], updates: int) -> None:
    for name in names:
        values = [row[name] for row in rows if name in row]
        assert len(values) == updates and all(map(math.isfinite, values)), (name, values)


def assert_changed(before: PreTrainedModel, after: PreTrainedModel, idle: tuple[str, ...] = ()) -> None:
    """All weights are finite and have moved, but those named in `idle` and biases: a key's moves all logits alike."""
    old, new = dict(before.named_parameters()), dict(after.named_parameters())
    assert old.keys() == new.keys()
    assert all(value.isfinite().all() for value in new.values())
    still = {name for name in old if torch.equal(old[name], new[name])}
    assert all("bias" in name or name in idle for name in still), still


@torch.no_grad()
def assert_reloads_alike(folder: Path, model: PreTrainedModel, start: PreTrainedModel) -> None:
    """Plain transformers reads from the folder the very model that was trained, not the one it started from."""
    trained = torch.load(folder / "probe.pt")
    mask = torch.ones_like(PROBE)
    # ZeRO-3 multiplies in another order: fp32 rounding of logits of size 10.
    torch.testing.assert_close(model.eval()(input_ids=PROBE, attention_mask=mask).logits, trained, rtol=0, atol=5e-5)
    assert (start.eval()(input_ids=PROBE, attention_mask=mask).logits - trained).abs().max() > 1e-2


@pytest.mark.distributed
@pytest.mark.parametrize("name", REWARDS)
def test_an_encoder_learns_to_judge_tokens(inputs: Path, name: str) -> None:
    base, run, kernel = inputs / "bases" / name, inputs / "judges" / name, REWARDS[name].kernel
    assert_finite_losses(read_metrics(run / "metrics.jsonl"), ["loss", "local_loss", "global_loss", "grad_norm"], 2)
    trained = AutoModelForTokenClassification.from_pretrained(run / "model", attn_implementation=kernel)
    start = load_token_reward_model(str(base), ModelOptions(attn_implementation=kernel))
    assert_reloads_alike(run, trained, start)
    # The tokens that are judged attend globally: no loss reaches what Longformer's last layer has for its window.
    window = [f"encoder.layer.1.attention.self.{part}.weight" for part in ("query", "key", "value")]
    assert_changed(start.base_model, trained.base_model, idle=tuple(window) if name == "longformer" else ())


@pytest.mark.distributed
@pytest.mark.parametrize("name", ACTORS)
def test_an_actor_goes_through_all_three_steps(inputs: Path, tmp_path: Path, name: str) -> None:
    family, judge = ACTORS[name], JUDGES[name]
    assert family.tokenizer != REWARDS[judge].tokenizer
    base = save_family(family, tmp_path / "base")
    sft, samples, tppo = (tmp_path / step for step in ("sft", "samples", "tppo"))
    outcome = run_on_ranks(
        run_steps, SINGLE_PROCESS,
        [
            ("step1_sft.main", sft_flags(inputs, base, sft, family.kernel)),
            ("step2_token_reward.sample", sample_flags(inputs, sft / "model", samples, family.kernel)),
            (
                "step3_tppo.main",
                tppo_flags(inputs, sft / "model", inputs / "judges" / judge / "model", tppo, family.kernel),
            ),
        ],
    )  # fmt: skip
    assert outcome == [[]]
    models = [
        AutoModelForCausalLM.from_pretrained(folder, attn_implementation=family.kernel)
        for folder in (base, sft / "model", tppo / "model")
    ]

    assert_finite_losses(read_metrics(sft / "metrics.jsonl"), ["loss", "grad_norm"], 2)
    assert_reloads_alike(sft, models[1], start=models[0])
    sampled = [row for _, row in read_jsonl(samples / "samples.jsonl") if row["origin"] == "sample"]
    assert len(sampled) == 10 and len({row["response"] for row in sampled}) > 5

    rows = read_metrics(tppo / "metrics.jsonl")
    losses = ["loss/policy", "loss/value", "policy/grad_norm", "value/grad_norm", "reward/score_per_response"]
    assert_finite_losses(rows, losses, 2)
    for row in rows:
        # Only the padding differs between the two passes, see tests/step3/test_updates.py.
        assert row["policy/max_ratio"] == pytest.approx(1.0, abs=5e-5)
        assert row["rollout/mismatch_max"] < 5e-5  # decoding row by row gives the log-probs of a whole pass
        assert row["policy/grad_norm"] > 0 and row["value/grad_norm"] > 0
    # Eight tokens of such a distance, before the first update.
    assert abs(rows[0]["kl/per_sequence"]) < 8 * 5e-5 < 1e-3 < abs(rows[1]["kl/per_sequence"])
    assert_reloads_alike(tppo, models[2], start=models[1])
    assert_changed(models[1], models[2])
    assert_changed(models[1].base_model, AutoModel.from_pretrained(tppo / "critic"))
    head = load_file(tppo / "critic" / VALUE_HEAD_NAME)
    assert all(value.isfinite().all() for value in head.values()) and head["bias"].abs() > 0


@pytest.mark.distributed
@pytest.mark.parametrize("name", [name for name in ACTORS if name not in NO_TOKEN_CLASSIFIER])
def test_a_decoder_that_reads_both_ways_learns_to_judge_tokens(inputs: Path, tmp_path: Path, name: str) -> None:
    family = ACTORS[name]
    base, run = save_family(family, tmp_path / "base"), tmp_path / "reward"
    flags = reward_flags(inputs, base, run, family.kernel, bidirectional=True)
    assert run_on_ranks(run_steps, SINGLE_PROCESS, [("step2_token_reward.main", flags)]) == [[]]
    assert_finite_losses(read_metrics(run / "metrics.jsonl"), ["loss", "local_loss", "global_loss", "grad_norm"], 2)
    assert json.loads((run / "model" / SETTINGS_NAME).read_text())["bidirectional"]
    options = ModelOptions(attn_implementation=family.kernel)
    trained = load_token_reward_model(str(run / "model"), options)
    assert_reloads_alike(run, trained, start=load_token_reward_model(str(base), options, bidirectional=True))
    other = PROBE.clone()
    other[:, -1] = 20
    with torch.no_grad():
        difference = trained(input_ids=other).logits - trained(input_ids=PROBE).logits
    assert (difference[:, :-1].abs().amax(-1) > 1e-6).any(), "a later token changes nothing before it"


@pytest.mark.parametrize("name", ACTORS)
def test_adapters_of_a_family_merge_into_a_plain_folder(tmp_path: Path, name: str) -> None:
    family = ACTORS[name]
    base = save_family(family, tmp_path / "base")
    options = ModelOptions(attn_implementation=family.kernel)
    start = load_causal_lm(str(base), options)
    model = apply_lora(load_causal_lm(str(base), options), LoraOptions(lora_r=4))
    torch.manual_seed(1)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:  # 0 at first
            torch.nn.init.normal_(parameter, std=0.1)
    with torch.no_grad():
        torch.save(model.eval()(input_ids=PROBE).logits, tmp_path / "probe.pt")
    save_model_folder(model, load_tokenizer(str(base)), tmp_path / "model", {})
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation=family.kernel)
    assert_reloads_alike(tmp_path, merged, start)


@pytest.mark.parametrize("name", NO_TOKEN_CLASSIFIER)
def test_a_family_without_a_token_classifier_is_refused_as_reward_model(tmp_path: Path, name: str) -> None:
    base = save_family(ACTORS[name], tmp_path)
    with pytest.raises(InputError, match=r"cannot load a token classifier .*AutoModelForTokenClassification"):
        load_token_reward_model(str(base), ModelOptions(attn_implementation=ACTORS[name].kernel), bidirectional=True)


REFUSED = {
    "mamba": (Family("mamba", "byte_level", {}, "eager"), "forward takes no position_ids"),
    "bloom": (Family("bloom", "byte_level", {}, "eager"), "forward takes no position_ids"),
    "falcon with alibi": (Family("falcon", "byte_level", {"alibi": True}), "biases made from masks (alibi)"),
    "qwen3_next": (
        Family("qwen3_next", "byte_level", {"num_hidden_layers": 4, "num_experts": 2}),
        "layers of the kind linear_attention",
    ),
    "gemma2 under SDPA": (
        ACTORS["gemma2"]._replace(kernel="sdpa"),
        "has no sdpa attention; add --attn_implementation eager",
    ),
    "t5": (Family("t5", "byte_level", {}), "AutoModelForCausalLM"),
}


@pytest.mark.distributed
@pytest.mark.parametrize("name", REFUSED)
def test_what_a_family_lacks_is_said_before_its_weights_are_read(inputs: Path, tmp_path: Path, name: str) -> None:
    family, message = REFUSED[name]
    base = save_family(ACTORS["llama"], tmp_path / "base")
    (base / "model.safetensors").unlink()
    AutoConfig.for_model(family.model_type, **family.settings).save_pretrained(base)
    reward = inputs / "judges" / "bert" / "model"
    for module, flags in (
        ("step1_sft.main", sft_flags(inputs, base, tmp_path / "sft", family.kernel)),
        ("step2_token_reward.sample", sample_flags(inputs, base, tmp_path / "samples", family.kernel)),
        ("step3_tppo.main", tppo_flags(inputs, base, reward, tmp_path / "tppo", family.kernel)),
    ):
        ((error,),) = run_on_ranks(run_steps, SINGLE_PROCESS, [(module, flags)])
        assert message in error, module


def test_only_dropout_is_switched_off_and_the_configuration_given_stays() -> None:
    for name, family in (ACTORS | REWARDS).items():
        config = family_config(family)
        before, after = config.to_dict(), without_dropout(config).to_dict()
        changed = {key for key in before if before[key] != after[key]}
        assert config.to_dict() == before
        assert all("drop" in key and after[key] == 0.0 for key in changed), name
    assert {"attn_pdrop", "resid_pdrop", "embd_pdrop"} <= {
        key for key, value in AutoConfig.for_model("gpt2").to_dict().items() if value == 0.1
    }


def test_adapters_with_dropout_are_refused_in_step_3() -> None:
    config = Step3Config(output_dir="o", actor_path="a", reward_path="r", data_dir="d", lora_r=4, lora_dropout=0.1)
    with pytest.raises(InputError, match="--lora_dropout must be 0 in step 3"):
        config.validate(world_size=1)


@pytest.mark.distributed
def test_a_critic_of_another_vocabulary_is_refused(inputs: Path, tmp_path: Path) -> None:
    actor = save_family(ACTORS["llama"], tmp_path / "actor")
    critic = save_family(ACTORS["mistral"], tmp_path / "critic")
    reward = inputs / "judges" / "bert" / "model"
    flags = [*tppo_flags(inputs, actor, reward, tmp_path / "run", "sdpa"), f"--critic_path={critic}"]
    ((error,),) = run_on_ranks(run_steps, SINGLE_PROCESS, [("step3_tppo.main", flags)])
    assert "they do not belong together" in error


@pytest.mark.parametrize(("name", "has_sdpa"), [("longformer", False), ("deberta-v2", False), ("roberta", True)])
def test_an_architecture_says_which_kernels_it_has(tmp_path: Path, name: str, has_sdpa: bool) -> None:
    skeleton = token_classifier_skeleton(str(save_family(REWARDS[name], tmp_path)), ModelOptions())
    assert has_attention(skeleton, "sdpa") is has_attention(skeleton, "flash_attention_2") is has_sdpa
    assert has_attention(skeleton, "eager")


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("family", "message"),
    [(REWARDS["longformer"], "LongformerForTokenClassification has no sdpa attention; add --attn_implementation eager"),
     (ACTORS["opt"], "OPTConfig")],
    ids=["kernel", "classifier"],
)  # fmt: skip
def test_what_a_reward_model_lacks_is_said_before_its_weights_are_read(
    inputs: Path, tmp_path: Path, family: Family, message: str
) -> None:
    base = save_family(family, tmp_path / "base")
    (base / "model.safetensors").unlink()
    flags = reward_flags(inputs, base, tmp_path / "run", "sdpa")
    ((error,),) = run_on_ranks(run_steps, SINGLE_PROCESS, [("step2_token_reward.main", flags)])
    assert message in error


def test_an_encoder_that_reads_distances_has_no_limit_of_positions() -> None:
    limits = RewardInputOptions("compact", 3, max_prompt_tokens=1024, max_response_tokens=128)
    for name, refused in (("deberta-v2", False), ("bert", True)):
        tokenizer = ALL[REWARDS[name].tokenizer]()
        config = family_config(REWARDS[name], vocab_size=len(tokenizer), pad_token_id=0)
        model = AutoModelForTokenClassification.from_config(config, attn_implementation=REWARDS[name].kernel).eval()
        with pytest.raises(InputError, match="160 positions") if refused else nullcontext():
            RewardEncoder(tokenizer, limits, model)
            assert model(input_ids=PROBE.repeat(1, 20)).logits.isfinite().all()


@pytest.mark.distributed
def test_a_head_of_other_classes_under_zero_3_names_the_remedy(inputs: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(inputs / "bases" / "roberta", num_labels=9)
    base = save_family(REWARDS["roberta"], tmp_path / "base")
    AutoModelForTokenClassification.from_config(config).save_pretrained(base)
    flags = reward_flags(inputs, base, tmp_path / "run", "sdpa")
    ((error,),) = run_on_ranks(run_steps, SINGLE_PROCESS, [("step2_token_reward.main", flags)])
    assert "add --zero_stage 2" in error
    flags = [*reward_flags(inputs, base, tmp_path / "whole", "sdpa"), "--zero_stage=2"]
    assert run_on_ranks(run_steps, SINGLE_PROCESS, [("step2_token_reward.main", flags)]) == [[]]
