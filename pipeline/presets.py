"""Which settings files a run takes: by the model and the machine, checked by the memory planner."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
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
ON_CPU = "cpu_lora"
ENCODERS = {"cpu": ON_CPU, "gpu": "1x24gb_encoder"}
STEPS = ("step1", "step2", "step3")
SPECIAL_TOKENS = 16  # room for separators, and for positions that a family does not use (RoBERTa: 2)


class Models(NamedTuple):
    """What a run tunes: the base model, '' for one that is made from the log, and the reward model, or what it starts
    from, '' for step 1's model. Folders or hub names."""

    base: str
    reward: str
    reward_positions: int = 0  # that the reward model's encoder has; 0: no limit, or not known yet

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


def adaptations(program: str, files: Sequence[str], models: Models) -> dict[str, str]:
    """The flags by which the settings files of `program` meet what is there, and not what they were written for.

    A history is cut to what an encoder with few positions can read beside the response (BERT's family: 512).
    """
    config = parse_config(SETTINGS[program].config, ["--config", *files])
    flags = {}
    if program == "step2" and models.reward_positions:
        room = models.reward_positions - config.max_response_tokens - SPECIAL_TOKENS
        if room < config.max_prompt_tokens:
            flags["max_prompt_tokens"] = str(room)
    return flags


def possible_presets(models: Models, hardware: Hardware) -> list[str]:
    """Every preset that `choose_preset` may choose, whatever the size of the model."""
    if not models.base:
        return ["tiny"]
    on_gpus = dict.fromkeys(name for _, names in BY_SIZE for name in names)
    return ["tiny", *(on_gpus if hardware.gpus else (ON_CPU,))]


def choose_preset(models: Models, hardware: Hardware, programs: Sequence[str] = STEPS) -> tuple[str, str]:
    """The preset for these programs of a run, and the reason in one line.

    Raises `InputError` where no preset's plan fits the machine.
    """
    if not models.base:
        return "tiny", "the model is made from the log"
    # The planner needs torch: what comes before it fails, or is chosen, at once.
    from common.planning.models import ModelSpec, weights_of

    kind = "token_classifier" if list(programs) == ["step2"] else "causal_lm"
    size = weights_of(ModelSpec(models.base, kind, eager=True), trained=False).total  # every model has that kernel
    if size <= MADE_FROM_LOG:
        return "tiny", f"{models.base} has {size:,} parameters, so that it was made from a log"
    what = f"{models.base} is pretrained and has {_count(size)} parameters"
    memory = hardware.memory()
    where = f"{hardware} with {memory / 2**30:.1f} GiB{' each' if hardware.ranks > 1 else ''}"
    names = next(names for limit, names in BY_SIZE if size <= limit) if hardware.gpus else (ON_CPU,)
    problems = []
    for name in names:
        peaks, problem = _plan(name, models, hardware, programs, memory)
        if not problem:
            return name, f"{what}; {where}; planned at most {', '.join(peaks)}"
        problems.append(f"{name}: {problem}")
    # Step 2 trains all weights, also where steps 1 and 3 train adapters.
    encoder = "" if models.reward else "start the reward model from an encoder (--reward_model), "
    raise InputError(
        f"{what}, and no preset fits {where}: {'; '.join(problems)}. Take a smaller model or more GPUs, {encoder}or "
        "choose with --preset NAME and change what scripts/plan.py advises (docs/planning.md)"
    )


def is_encoder(model: str) -> bool:
    """Whether a model for step 2 is an encoder, whose settings are others than a decoder's."""
    from common.models.token_reward import reads_causally
    from common.planning.models import ModelSpec, meta_model

    return not reads_causally(meta_model(ModelSpec(model, "token_classifier", eager=True)))


def _plan(
    name: str, models: Models, hardware: Hardware, programs: Sequence[str], memory: int
) -> tuple[list[str], str]:
    """The planned peaks of the steps under a preset, and why it does not fit ('' if it does)."""
    from common.planning.plan import Machine, shown

    machine = Machine(hardware.ranks, memory, cuda=bool(hardware.gpus))
    peaks = []
    for program, config, plan in _planned_steps(name, models, hardware, programs):
        if isinstance(config, Step3Config):
            try:
                config.validate(hardware.ranks)
            except InputError as error:
                return peaks, str(error)
        found = plan(config, machine)
        if found.peak > memory:
            return peaks, f"step {program[-1]} needs {shown(found.peak)} in {found.fullest.name}"
        peaks.append(f"{shown(found.peak)} in step {program[-1]}")
    return peaks, ""


def _planned_steps(
    name: str, models: Models, hardware: Hardware, programs: Sequence[str]
) -> Iterator[tuple[str, Any, Callable[..., Any]]]:
    from common.models.kernels import settle_dtype
    from step1_sft.planning import plan_step1
    from step2_token_reward.planning import plan_step2
    from step3_tppo.planning import plan_step3

    plans = {"step1": plan_step1, "step2": plan_step2, "step3": plan_step3}
    there = {"output_dir": "-", "data_dir": "-", "samples": "-", "labels": "-"}  # what no plan reads
    given = {
        "step1": {"model_name_or_path": models.base},
        "step2": {"model_name_or_path": models.scorer},
        "step3": {"actor_path": models.base, "reward_path": models.scorer},
    }
    for program in programs:
        files = config_files(program, name, models, hardware)
        flags = [f"--{flag}={value}" for flag, value in adaptations(program, files, models).items()]
        config = parse_config(SETTINGS[program].config, ["--config", *files, *flags])
        fields = {field.name for field in dataclasses.fields(config)}
        values = {key: value for key, value in (there | given[program]).items() if key in fields}
        yield program, settle_dtype(dataclasses.replace(config, **values)), plans[program]


def _count(size: float) -> str:
    return f"{size / 1e9:.1f} billion" if size >= 1e9 else f"{size / 1e6:.0f} million"
