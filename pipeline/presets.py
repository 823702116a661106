"""Which settings files a run takes: by the model and the machine, checked by the memory planner."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from common.config import parse_config
from common.errors import InputError
from pipeline.hardware import Hardware
from step1_sft.config import SftConfig
from step2_token_reward.config import Step2Config
from step2_token_reward.sample_config import SampleConfig
from step3_tppo.config import Step3Config

ROOT = Path(__file__).resolve().parents[1]
AUTO, NONE = "auto", "none"
EMPTY = "/dev/null"  # in place of the files that a launcher names itself
# A model this small was made from a log (common/models/tiny.py); the smallest pretrained ones have ten times as many.
MADE_FROM_LOG = 5_000_000


class Settings(NamedTuple):
    """A program's settings: its config class, the folder of its files, and the base file that precedes a preset."""

    config: type
    folder: Path
    recipe: str


SETTINGS = {
    "step1": Settings(SftConfig, ROOT / "step1_sft/configs", "recipe.yaml"),
    "sample": Settings(SampleConfig, ROOT / "step2_token_reward/configs", "recipe_sample.yaml"),
    "step2": Settings(Step2Config, ROOT / "step2_token_reward/configs", "recipe.yaml"),
    "step3": Settings(Step3Config, ROOT / "step3_tppo/configs", "recipe.yaml"),
}
# Presets by the parameters of the model, in the order in which they are tried: all weights before adapters.
BY_SIZE = (
    (10e9, ("8x80gb_full", "8x80gb_lora", "1x24gb_lora")),
    (40e9, ("2x8x80gb_full", "70b_lora")),
    (float("inf"), ("70b_lora",)),
)
# Where step 2's file has another name than the one of steps 1 and 3.
REWARD_FILES = {"1x24gb_lora": "1x24gb_encoder", "8x80gb_lora": "8x80gb_full", "70b_lora": "8x80gb_full"}
SAMPLE_FILES = {"tiny": "tiny_sample", "cpu_lora": "cpu_lora_sample", "1x24gb_lora": "1x24gb_sample"}
ENCODERS = {"cpu": "cpu_lora", "gpu": "1x24gb_encoder"}


class Models(NamedTuple):
    """What a run tunes: the base model, '' for one that is made from the log, and what the reward model starts from, ''
    for step 1's model. Folders or hub names."""

    base: str
    reward: str

    @property
    def scorer(self) -> str:
        """The architecture of the reward model."""
        return self.reward or self.base


def config_files(program: str, preset: str, models: Models, hardware: Hardware) -> list[str]:
    """The settings files of `program`, a key of `SETTINGS`, under a preset. Raises `InputError` for an unknown one.

    A reward model that starts from a pretrained encoder has settings of its own, whatever the actor's are.
    """
    if preset == NONE:
        return [EMPTY]
    settings = SETTINGS[program]
    name = preset
    if program == "sample":
        name = SAMPLE_FILES.get(preset, "8x80gb_sample")
    elif program == "step2":
        own = ENCODERS["gpu" if hardware.gpus else "cpu"]
        name = own if models.reward else REWARD_FILES.get(preset, preset)
    path = settings.folder / f"{name}.yaml"
    if not path.is_file():
        known = sorted(file.stem for file in settings.folder.glob("*.yaml") if not file.stem.startswith("recipe"))
        raise InputError(f"--preset {preset}: no such file in {settings.folder}; there are {', '.join(known)}")
    return [str(settings.folder / settings.recipe), str(path)]


def choose_preset(models: Models, hardware: Hardware) -> tuple[str, str]:
    """The preset of a run, and the reason in one line.

    Raises `InputError` where no preset's plan fits the machine.
    """
    if not models.base:
        return "tiny", "the model is made from the log"
    # The planner needs torch: what comes before it fails, or is chosen, at once.
    from common.planning.models import ModelSpec, weights_of

    size = weights_of(ModelSpec(models.base, "causal_lm"), trained=False).total
    if size <= MADE_FROM_LOG:
        return "tiny", f"{models.base} has {size:,} parameters, so that it was made from a log"
    what = f"{models.base} is pretrained and has {_count(size)} parameters"
    memory = hardware.memory()
    where = f"{hardware} with {memory / 2**30:.1f} GiB{' each' if hardware.ranks > 1 else ''}"
    names = next(names for limit, names in BY_SIZE if size <= limit) if hardware.gpus else ("cpu_lora",)
    problems = []
    for name in names:
        peaks, problem = _plan(name, models, hardware, memory)
        if not problem:
            return name, f"{what}; {where}; planned at most {', '.join(peaks)}"
        problems.append(f"{name}: {problem}")
    raise InputError(
        f"{what}, and no preset fits {where}: {'; '.join(problems)}. Take a smaller model or more GPUs, or choose with "
        "--preset NAME and change what scripts/plan.py advises (docs/planning.md)"
    )


def _plan(name: str, models: Models, hardware: Hardware, memory: int) -> tuple[list[str], str]:
    """The planned peaks of the steps under a preset, and why it does not fit ('' if it does)."""
    from common.planning.plan import Machine, shown

    machine = Machine(hardware.ranks, memory, cuda=bool(hardware.gpus))
    peaks = []
    for step, (config, plan) in enumerate(_planned_steps(name, models, hardware), start=1):
        if step == 3:
            try:
                config.validate(hardware.ranks)
            except InputError as error:
                return peaks, str(error)
        found = plan(config, machine)
        if found.peak > memory:
            return peaks, f"step {step} needs {shown(found.peak)} in {found.fullest.name}"
        peaks.append(f"{shown(found.peak)} in step {step}")
    return peaks, ""


def _planned_steps(name: str, models: Models, hardware: Hardware) -> Iterator[tuple[Any, Callable[..., Any]]]:
    from common.models.kernels import settle_dtype
    from step1_sft.planning import plan_step1
    from step2_token_reward.planning import plan_step2
    from step3_tppo.planning import plan_step3

    there = {"output_dir": "-", "data_dir": "-", "samples": "-", "labels": "-"}  # what no plan reads
    given = {
        "step1": {"model_name_or_path": models.base},
        "step2": {"model_name_or_path": models.scorer},
        "step3": {"actor_path": models.base, "reward_path": models.scorer},
    }
    for program, plan in (("step1", plan_step1), ("step2", plan_step2), ("step3", plan_step3)):
        config = parse_config(SETTINGS[program].config, ["--config", *config_files(program, name, models, hardware)])
        fields = {field.name for field in dataclasses.fields(config)}
        values = {key: value for key, value in (there | given[program]).items() if key in fields}
        yield settle_dtype(dataclasses.replace(config, **values)), plan


def _count(size: float) -> str:
    return f"{size / 1e9:.1f} billion" if size >= 1e9 else f"{size / 1e6:.0f} million"
