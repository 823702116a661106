"""Every preset: read, checked for its machine, accepted by DeepSpeed, and run with tiny models of real architectures.

What a CPU run cannot take from a preset, and nothing else, is given as flags:
- `attn_implementation`: flash attention needs a CUDA GPU;
- `dtype`: fp32, because CPUs have no fast bf16;
- the amount: two updates; in step 3 eight prompts a rollout, in as many minibatches, and one step for the critic alone.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import yaml
from deepspeed.runtime.config import DeepSpeedConfig

from common.config import parse_config
from common.engine.deepspeed_config import inference_config, training_config
from common.files import read_jsonl
from common.tracking import read_metrics
from step1_sft.config import SftConfig
from step1_sft.config import check_config as check_sft
from step2_token_reward.config import Step2Config
from step2_token_reward.config import check_config as check_reward
from step2_token_reward.sample_config import SampleConfig
from step2_token_reward.sample_config import check_config as check_sample
from step3_tppo.config import Step3Config
from tests.distributed.ranks import run_on_ranks
from tests.families import ACTORS, REWARDS, Family, flags, run_steps, save_family, write_data
from tests.test_families import assert_finite_losses

GPUS = {"tiny": 2, "1x24gb": 1, "8x80gb": 8, "2x8x80gb": 16, "70b": 8}
# Of each class of models one family that people would use there; step 2's encoder is the paper's.
FAMILIES = {"tiny": "llama", "1x24gb": "qwen2", "8x80gb": "mistral", "2x8x80gb": "qwen3", "70b": "llama"}
REQUIRED = {
    "SftConfig": ("model_name_or_path", "data_dir", "output_dir"),
    "Step2Config": ("model_name_or_path", "samples", "labels", "output_dir"),
    "SampleConfig": ("model_name_or_path", "data_dir", "output_dir"),
    "Step3Config": ("actor_path", "reward_path", "data_dir", "output_dir"),
}


class Preset(NamedTuple):
    """A YAML file, the machine that its name begins with, and what reads it."""

    path: Path
    machine: str
    config_class: type

    def parse(self, **more: Any) -> Any:
        """The config with the preset's values, `more` over them."""
        return parse_config(self.config_class, ["--config", str(self.path), *flags({}, **more)])

    @property
    def given(self) -> set[str]:
        """The keys in the file."""
        return set(yaml.safe_load(self.path.read_text()))


def presets() -> list[Preset]:
    found = []
    for path in sorted(Path().glob("step*/configs/*.yaml")):
        classes = {"step1_sft": SftConfig, "step2_token_reward": Step2Config, "step3_tppo": Step3Config}
        config_class = SampleConfig if path.stem.endswith("_sample") else classes[path.parts[0]]
        found.append(Preset(path, path.stem.split("_")[0], config_class))
    return found


def of(config_class: type) -> list[Preset]:
    return [preset for preset in presets() if preset.config_class is config_class]


def named(preset: Preset) -> str:
    return str(preset.path)


def test_every_machine_has_a_preset_in_steps_1_and_3() -> None:
    for config_class in (SftConfig, Step3Config):
        names = {preset.path.stem for preset in of(config_class)}
        assert names == {"tiny", "1x24gb_lora", "8x80gb_full", "8x80gb_lora", "2x8x80gb_full", "70b_lora"}
    assert {preset.machine for preset in presets()} == GPUS.keys()


@pytest.mark.parametrize("preset", presets(), ids=named)
def test_a_preset_fits_the_number_of_ranks_of_its_machine(preset: Preset) -> None:
    config = preset.parse(**dict.fromkeys(REQUIRED[preset.config_class.__name__], "given"))
    # The kernel is the machine's to check: there is no GPU here.
    config = dataclasses.replace(config, attn_implementation="sdpa")
    if isinstance(config, Step3Config):
        config.validate(GPUS[preset.machine])
    else:
        {SftConfig: check_sft, Step2Config: check_reward, SampleConfig: check_sample}[preset.config_class](config)
    if preset.machine != "tiny":
        header = preset.path.read_text().split("\ndtype")[0]
        assert "# Machine: " in header and "# Does not fit?" in header and "# Holds" in header
        assert config.dtype == "bf16"
    assert ("lora_r" in preset.given) == preset.path.stem.endswith("_lora")


@pytest.mark.parametrize("preset", of(Step3Config), ids=named)
def test_deepspeed_accepts_what_a_preset_asks_for(preset: Preset) -> None:
    """Steps 1 and 2 leave batch sizes to the Trainer; their settings are accepted where they run, below."""
    config, ranks = preset.parse(), GPUS[preset.machine]
    training = training_config(
        config, micro_batch_size=config.micro_batch_size, world_size=ranks, max_grad_norm=config.max_grad_norm
    )
    with mock.patch("deepspeed.runtime.config.dist") as dist:
        dist.get_world_size.return_value, dist.get_rank.return_value = ranks, 0
        trained, frozen = DeepSpeedConfig(training), DeepSpeedConfig(inference_config(config, world_size=ranks))
    assert trained.zero_config.stage == config.zero_stage
    assert trained.bfloat16_config.enabled == (config.dtype == "bf16")
    assert (trained.train_batch_size, trained.gradient_clipping) == (config.micro_batch_size * ranks, 1.0)
    assert frozen.zero_config.stage == (3 if config.zero_stage == 3 else 0)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Examples, labelled samples, and models with as many positions as the presets' budgets need."""
    folder = write_data(tmp_path_factory.mktemp("presets"))
    for name in set(FAMILIES.values()):
        save_family(roomy(ACTORS[name]), folder / name)
    save_family(roomy(REWARDS["longformer"]), folder / "longformer")
    return folder


def roomy(family: Family) -> Family:
    return family._replace(settings=family.settings | {"max_position_embeddings": 2048})


def on_cpu(preset: Preset, **amount: Any) -> dict[str, Any]:
    """The flags that a run on the CPU needs beside the preset: see the module."""
    assert preset.machine == "tiny" or {"dtype", "attn_implementation"} <= preset.given
    kernel = "eager" if preset.path.stem == "1x24gb_encoder" else "sdpa"
    return {"config": preset.path, "dtype": "fp32", "attn_implementation": kernel, "tensorboard": False, **amount}


def run(module: str, settings: dict[str, Any], **paths: Path) -> None:
    assert run_on_ranks(run_steps, 1, [(module, flags(settings, **paths))]) == [[]]


@pytest.mark.distributed
@pytest.mark.parametrize("preset", of(SftConfig), ids=named)
def test_step_1_runs_with_a_preset(inputs: Path, tmp_path: Path, preset: Preset) -> None:
    model = inputs / FAMILIES[preset.machine]
    run(
        "step1_sft.main", on_cpu(preset, max_steps=2), model_name_or_path=model, data_dir=inputs / "data",
        output_dir=tmp_path / "run",
    )  # fmt: skip
    assert_finite_losses(read_metrics(tmp_path / "run" / "metrics.jsonl"), ["eval_loss", "train_loss"], 1)
    adapter = tmp_path / "run" / "model" / "adapter" / "adapter_model.safetensors"
    assert adapter.is_file() == preset.path.stem.endswith("_lora")


@pytest.mark.distributed
@pytest.mark.parametrize("preset", of(SampleConfig), ids=named)
def test_samples_are_drawn_with_a_preset(inputs: Path, tmp_path: Path, preset: Preset) -> None:
    settings = on_cpu(preset)
    del settings["tensorboard"]
    run(
        "step2_token_reward.sample", settings, model_name_or_path=inputs / FAMILIES[preset.machine],
        data_dir=inputs / "data", output_dir=tmp_path / "run",
    )  # fmt: skip
    origins = [row["origin"] for _, row in read_jsonl(tmp_path / "run" / "samples.jsonl")]
    assert (origins.count("gold"), origins.count("sample")) == (10, 20)


@pytest.mark.distributed
@pytest.mark.parametrize("preset", of(Step2Config), ids=named)
def test_step_2_runs_with_a_preset(inputs: Path, tmp_path: Path, preset: Preset) -> None:
    model = "longformer" if preset.path.stem.endswith("_encoder") else FAMILIES[preset.machine]
    run(
        "step2_token_reward.main", on_cpu(preset, max_steps=2), model_name_or_path=inputs / model,
        samples=inputs / "samples.jsonl", labels=inputs / "labels.jsonl", output_dir=tmp_path / "run",
    )  # fmt: skip
    assert_finite_losses(read_metrics(tmp_path / "run" / "metrics.jsonl"), ["eval_loss", "train_loss"], 1)


@pytest.fixture(scope="module")
def reward(inputs: Path) -> Path:
    """A reward model for step 3: the paper's encoder, trained with its preset."""
    preset = next(preset for preset in of(Step2Config) if preset.path.stem == "1x24gb_encoder")
    run(
        "step2_token_reward.main", on_cpu(preset, max_steps=1), model_name_or_path=inputs / "longformer",
        samples=inputs / "samples.jsonl", labels=inputs / "labels.jsonl", output_dir=inputs / "reward",
    )  # fmt: skip
    return inputs / "reward" / "model"


@pytest.mark.distributed
@pytest.mark.parametrize("preset", of(Step3Config), ids=named)
def test_step_3_runs_with_a_preset(inputs: Path, reward: Path, tmp_path: Path, preset: Preset) -> None:
    config = preset.parse()
    updates = config.rollout_batch_size * config.samples_per_prompt // config.mini_batch_size
    amount = {"rollout_batch_size": 8, "mini_batch_size": 8 * config.samples_per_prompt // updates}
    run(
        "step3_tppo.main", on_cpu(preset, total_steps=2, critic_warmup_steps=1, **amount),
        actor_path=inputs / FAMILIES[preset.machine], reward_path=reward, data_dir=inputs / "data",
        output_dir=tmp_path / "run",
    )  # fmt: skip
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert_finite_losses(rows, ["loss/policy", "loss/value", "kl/per_sequence", "reward/score_per_response"], 2)
    assert updates == 4
    assert [row["policy/optimizer_steps"] for row in rows] == [updates, updates]
    assert rows[1]["policy/grad_norm"] > 0 and rows[1]["value/grad_norm"] > 0
    adapter = tmp_path / "run" / "model" / "adapter" / "adapter_model.safetensors"
    assert adapter.is_file() == preset.path.stem.endswith("_lora")
