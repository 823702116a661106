"""Every preset after its recipe: read, checked for its machine, accepted by DeepSpeed, and run with tiny models.

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
from common.files import read_json, read_jsonl
from common.tracking import read_metrics
from step1_sft.config import SftConfig
from step1_sft.config import check_config as check_sft
from step2_token_reward.config import Step2Config
from step2_token_reward.config import check_config as check_reward
from step2_token_reward.sample_config import SampleConfig
from step2_token_reward.sample_config import check_config as check_sample
from step3_tppo.config import Step3Config
from study.settings import CREDIT, PPO_SYSTEMS, SENTENCE_COEF
from tests.distributed.ranks import run_on_ranks
from tests.families import ACTORS, REWARDS, Family, flags, run_steps, save_family, write_data
from tests.test_families import assert_finite_losses

RANKS = {"tiny": 2, "cpu": 2, "1x24gb": 1, "8x80gb": 8, "2x8x80gb": 16, "70b": 8}
ON_CPU = ("tiny", "cpu")
# Of each class of models one family that people would use there.
FAMILIES = {
    "tiny": "llama", "cpu": "llama", "1x24gb": "qwen2", "8x80gb": "mistral", "2x8x80gb": "qwen3", "70b": "llama"
}  # fmt: skip
ENCODERS = {"1x24gb_encoder": "longformer", "cpu_lora": "bert"}  # step 2's, by preset; the first is the paper's
STUDY = Path("docs/results/search.json")
# What the presets of the random model need and a pretrained model must not meet.
TINY = {
    SftConfig: {"prompt_template", "prompt_loss_weight", "num_train_epochs", "learning_rate"},
    SampleConfig: {"prompt_template"},
    Step2Config: {"prompt_template", "learning_rate"},
    Step3Config: {"prompt_template", "target_kl", "critic_learning_rate"},
}
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

    @property
    def recipe(self) -> Path:
        """The file that the preset follows."""
        return self.path.with_name("recipe_sample.yaml" if self.config_class is SampleConfig else "recipe.yaml")

    @property
    def config_flags(self) -> list[str]:
        """The recipe, then the preset, as a command's arguments."""
        return ["--config", str(self.recipe), str(self.path)]

    def parse(self, **more: Any) -> Any:
        """The config with the recipe's values, the preset's over them, and `more` over both."""
        return parse_config(self.config_class, [*self.config_flags, *flags({}, **more)])

    @property
    def given(self) -> set[str]:
        """The keys in the preset's own file."""
        return yaml_of(self.path).keys()

    @property
    def trains_adapters(self) -> bool:
        """By its name; step 2 trains all weights, and takes the names of steps 1 and 3 where it goes with them."""
        return self.config_class is not Step2Config and self.path.stem.endswith("_lora")


def yaml_of(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def presets() -> list[Preset]:
    found = []
    for path in sorted(Path().glob("step*/configs/*.yaml")):
        if path.stem.startswith("recipe"):
            continue
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
        assert names == {"tiny", "cpu_lora", "1x24gb_lora", "8x80gb_full", "8x80gb_lora", "2x8x80gb_full", "70b_lora"}
    for config_class in (Step2Config, SampleConfig):
        assert {"tiny", "cpu", "1x24gb", "8x80gb"} <= {preset.machine for preset in of(config_class)}
    assert {preset.machine for preset in presets()} == RANKS.keys()


@pytest.mark.parametrize("preset", presets(), ids=named)
def test_a_preset_holds_keys_of_its_step_that_differ_from_its_recipe(preset: Preset) -> None:
    known = {field.name for field in dataclasses.fields(preset.config_class)}
    recipe = yaml_of(preset.recipe).keys()
    assert preset.given <= known and recipe <= known
    config, shared = preset.parse(), parse_config(preset.config_class, ["--config", str(preset.recipe)])
    assert not [key for key in preset.given & recipe if getattr(config, key) == getattr(shared, key)]


def test_step_3s_recipe_and_the_tiny_models_learning_rate_are_what_the_study_chose() -> None:
    chosen = read_json(STUDY)["chosen"]["tppo"]
    shared = {key: value for key, value in chosen.items() if key not in ("credit", "actor_learning_rate")}
    found = {
        **shared, "line_gamma": Step3Config().line_gamma, **CREDIT[chosen["credit"]], "sentence_coef": SENTENCE_COEF,
        "reward_level": PPO_SYSTEMS["tppo"]["level"],
    }  # fmt: skip
    assert {"kl_coef", "reward_scale", "gamma", "lam", "line_gamma"} <= found.keys()
    recipe = yaml_of(Path("step3_tppo/configs/recipe.yaml"))
    assert {key: recipe.get(key) for key in found} == found
    # Rates are those of a model's size, all else is the method's, on every machine.
    tiny = next(preset for preset in of(Step3Config) if preset.machine == "tiny")
    assert tiny.parse().actor_learning_rate == chosen["actor_learning_rate"]
    assert not [preset.path for preset in of(Step3Config) if preset.given & found.keys()]


def made_for_a_random_model(preset: Preset) -> set[str]:
    """The names of those settings of a preset, with its recipe's, that fit a random model alone."""
    config = preset.parse()
    highest_rate = 1e-3 if preset.trains_adapters else 1e-4
    spoils = {
        "prompt_template": lambda template: template == "compact",
        "prompt_loss_weight": lambda weight: weight > 0,
        "num_train_epochs": lambda epochs: epochs > 3,
        "target_kl": lambda limit: limit == 0,
        **dict.fromkeys(
            ("learning_rate", "actor_learning_rate", "critic_learning_rate"), lambda rate: rate > highest_rate
        ),
    }
    return {name for name, spoiled in spoils.items() if hasattr(config, name) and spoiled(getattr(config, name))}


@pytest.mark.parametrize("preset", presets(), ids=named)
def test_the_random_models_settings_are_in_no_preset_for_pretrained_models(preset: Preset) -> None:
    expected = TINY[preset.config_class] if preset.machine == "tiny" else set()
    assert made_for_a_random_model(preset) == expected


@pytest.mark.parametrize("preset", presets(), ids=named)
def test_a_preset_fits_the_number_of_ranks_of_its_machine(preset: Preset) -> None:
    config = preset.parse(**dict.fromkeys(REQUIRED[preset.config_class.__name__], "given"))
    # The kernel is the machine's to check: there is no GPU here.
    config = dataclasses.replace(config, attn_implementation="sdpa")
    if isinstance(config, Step3Config):
        config.validate(RANKS[preset.machine])
    else:
        {SftConfig: check_sft, Step2Config: check_reward, SampleConfig: check_sample}[preset.config_class](config)
    if preset.machine != "tiny":
        header = preset.path.read_text().split("\ndtype")[0]
        assert "# Machine: " in header and "# Does not fit?" in header and "# Holds" in header
    assert config.dtype == ("fp32" if preset.machine in ON_CPU else "bf16")
    assert ("lora_r" in preset.given) == preset.trains_adapters


@pytest.mark.parametrize("preset", of(Step3Config), ids=named)
def test_deepspeed_accepts_what_a_preset_asks_for(preset: Preset) -> None:
    """Steps 1 and 2 leave batch sizes to the Trainer; their settings are accepted where they run, below."""
    config, ranks = preset.parse(), RANKS[preset.machine]
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
    for name in ENCODERS.values():
        save_family(roomy(REWARDS[name]), folder / name)
    return folder


def roomy(family: Family) -> Family:
    return family._replace(settings=family.settings | {"max_position_embeddings": 2048})


def on_cpu(preset: Preset, **amount: Any) -> dict[str, Any]:
    """The flags that a run on the CPU needs beside the preset: see the module."""
    assert preset.machine == "tiny" or {"dtype", "attn_implementation"} <= preset.given
    kernel = "eager" if preset.path.stem == "1x24gb_encoder" else "sdpa"
    return {"dtype": "fp32", "attn_implementation": kernel, **amount}


def run(module: str, preset: Preset, settings: dict[str, Any], **paths: Path) -> None:
    arguments = [*preset.config_flags, *flags(settings, **paths)]
    assert run_on_ranks(run_steps, 1, [(module, arguments)]) == [[]]


@pytest.mark.distributed
@pytest.mark.parametrize("preset", of(SftConfig), ids=named)
def test_step_1_runs_with_a_preset(inputs: Path, tmp_path: Path, preset: Preset) -> None:
    model = inputs / FAMILIES[preset.machine]
    run(
        "step1_sft.main", preset, on_cpu(preset, max_steps=2, tensorboard=False), model_name_or_path=model,
        data_dir=inputs / "data", output_dir=tmp_path / "run",
    )  # fmt: skip
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert_finite_losses(rows, ["eval_loss"], 2)  # the base model's and, after two updates, this one's
    assert_finite_losses(rows, ["train_loss"], 1)
    adapter = tmp_path / "run" / "model" / "adapter" / "adapter_model.safetensors"
    assert adapter.is_file() == preset.trains_adapters


@pytest.mark.distributed
@pytest.mark.parametrize("preset", of(SampleConfig), ids=named)
def test_samples_are_drawn_with_a_preset(inputs: Path, tmp_path: Path, preset: Preset) -> None:
    run(
        "step2_token_reward.sample", preset, on_cpu(preset), model_name_or_path=inputs / FAMILIES[preset.machine],
        data_dir=inputs / "data", output_dir=tmp_path / "run",
    )  # fmt: skip
    origins = [row["origin"] for _, row in read_jsonl(tmp_path / "run" / "samples.jsonl")]
    assert (origins.count("gold"), origins.count("sample")) == (10, 20)


@pytest.mark.distributed
@pytest.mark.parametrize("preset", of(Step2Config), ids=named)
def test_step_2_runs_with_a_preset(inputs: Path, tmp_path: Path, preset: Preset) -> None:
    model = ENCODERS.get(preset.path.stem, FAMILIES[preset.machine])
    run(
        "step2_token_reward.main", preset, on_cpu(preset, max_steps=2, tensorboard=False),
        model_name_or_path=inputs / model,
        samples=inputs / "samples.jsonl", labels=inputs / "labels.jsonl", output_dir=tmp_path / "run",
    )  # fmt: skip
    assert_finite_losses(read_metrics(tmp_path / "run" / "metrics.jsonl"), ["eval_loss", "train_loss"], 1)


@pytest.fixture(scope="module")
def reward(inputs: Path) -> Path:
    """A reward model for step 3: the paper's encoder, trained with its preset."""
    preset = next(preset for preset in of(Step2Config) if preset.path.stem == "1x24gb_encoder")
    run(
        "step2_token_reward.main", preset, on_cpu(preset, max_steps=1, tensorboard=False),
        model_name_or_path=inputs / "longformer",
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
        "step3_tppo.main", preset,
        on_cpu(preset, total_steps=2, critic_warmup_steps=1, tensorboard=False, **amount),
        actor_path=inputs / FAMILIES[preset.machine], reward_path=reward, data_dir=inputs / "data",
        output_dir=tmp_path / "run",
    )  # fmt: skip
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert_finite_losses(rows, ["loss/policy", "loss/value", "kl/per_sequence", "reward/score_per_response"], 2)
    assert updates == (2 if preset.machine == "cpu" else 4)
    assert [row["policy/optimizer_steps"] for row in rows] == [updates, updates]
    assert rows[1]["policy/grad_norm"] > 0 and rows[1]["value/grad_norm"] > 0
    adapter = tmp_path / "run" / "model" / "adapter" / "adapter_model.safetensors"
    assert adapter.is_file() == preset.trains_adapters
