"""One way from a YAML file and the command line to a step's config dataclass."""

from __future__ import annotations

import dataclasses
import difflib
import math
import sys
from itertools import takewhile
from typing import Any, NoReturn, TypeVar

import yaml

from common.command_help import LIMITS, GroupedParser
from common.errors import InputError, one_line
from common.files import read_text

Config = TypeVar("Config")


MAX_SEED = 2**32 - 1  # numpy's
HANG_TIMEOUT = 1800.0  # seconds; the default of --hang_timeout


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field with a default and the help text that `--help` shows; `group` begins a heading there.

    A number lies within `minimum` (0 if none is given: no setting is negative), `maximum`, `above` and `below`; see
    `check_numbers`.
    """
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata={"help": help, **metadata})
    return dataclasses.field(default=default, metadata={"help": help, **metadata})


@dataclasses.dataclass
class RunOptions:
    """Where a run writes and how it may be repeated."""

    output_dir: str = option("", "Folder that this step writes; it must be new, or see resume and overwrite.")
    resume: bool = option(False, "Go on from the last complete checkpoint in output_dir.")
    overwrite: bool = option(False, "Replace the run that output_dir holds.")
    seed: int = option(0, "Seed of every random choice: data order, sampling, initial weights.", maximum=MAX_SEED)
    tensorboard: bool = option(True, "Write TensorBoard event files under output_dir/tensorboard.")


@dataclasses.dataclass
class ModelOptions:
    """How weights are loaded."""

    attn_implementation: str = option(
        "sdpa", "Attention kernel, checked at start.",
        choices=["sdpa", "eager", "flash_attention_2", "flex_attention"],
    )
    dtype: str = option(
        "auto", "Precision of weights and activations; auto: bf16 on a GPU that has it, else fp32.",
        choices=["auto", "fp32", "bf16"],
    )
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass to save memory.")
    trust_remote_code: bool = option(False, "Run model code from the hub. Only for repositories that you trust.")
    liger: bool = option(False, "Liger's kernels for norms, MLPs and rotary positions (CUDA), checked at start.")


@dataclasses.dataclass
class LoraOptions:
    """Adapters instead of full fine-tuning (peft, docs/adapters.md)."""

    lora_r: int = option(0, "Rank of the LoRA adapters; 0 trains all weights.")
    lora_alpha: int = option(16, "LoRA scale: the update is multiplied by lora_alpha / lora_r.", minimum=1)
    lora_rslora: bool = option(False, "Scale by lora_alpha / sqrt(lora_r), for high ranks (Kalajdzievski 2023).")
    lora_dora: bool = option(False, "Learn each weight's magnitude apart from its direction (DoRA, Liu et al. 2024).")
    lora_dropout: float = option(
        0.0, "Dropout on the adapters' input. Keep 0 in step 3: log-probs must repeat.", below=1
    )
    lora_target_modules: str = option("all-linear", "Modules that get adapters: peft's name, or names with commas.")
    quantize: str = option(
        "none", "The frozen weights under the adapters in 4 bits (QLoRA, Dettmers et al. 2023); CUDA, ZeRO 0 to 2.",
        choices=["none", "nf4"],
    )


@dataclasses.dataclass
class OptimizerOptions:
    """What an optimiser's step runs on."""

    fused_adam: bool = option(False, "torch's fused AdamW: one kernel for all weights instead of one each.")


@dataclasses.dataclass
class ZeroOptions:
    """DeepSpeed."""

    zero_stage: int = option(3, "ZeRO stage: what is sharded over the ranks.", choices=[0, 1, 2, 3])
    offload: str = option(
        "none", "What rests in host memory: nothing, optimizer states, or those and parameters (ZeRO-3).",
        choices=["none", "optimizer", "all"],
    )
    deepspeed_config: str = option("", "A DeepSpeed JSON file; it replaces the settings made from the flags.")


def parse_config(config_class: type[Config], argv: list[str] | None = None) -> Config:
    """Fill `config_class` from `--config FILE.yaml [FILE.yaml ...]` and then from flags; a later source wins.

    A second `--config` replaces the first, as a second value of any flag does.

    Unknown keys and flags, wrong types and wrong choices raise `InputError` and name the nearest known key; so do
    numbers out of range.
    YAML values pass through the same conversion as flags, so `1e-4` is a number in both.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    # The deepspeed launcher appends this flag; ranks are read from the environment instead.
    argv = [token for token in argv if not token.startswith("--local_rank=")]
    parser = _Parser(config_class)
    known = [field.name for field in dataclasses.fields(config_class)]
    if not {"-h", "--help"} & set(argv):
        argv = _yaml_tokens(argv, known) + argv
    config, _, unknown = parser.parse_args_into_dataclasses(args=argv, return_remaining_strings=True)
    if unknown:
        parser.error(f"unknown argument: {' '.join(unknown)}")
    check_numbers(config)
    return config


def check_numbers(config: Any) -> None:
    """Raise `InputError` for a number of a config that is not finite, or that its `option` does not allow."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        limits = {name: field.metadata[name] for name in LIMITS if name in field.metadata}
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and (problem := _range_problem(number, **limits)):
                raise InputError(f"--{field.name} {problem}, not {number}")


def _range_problem(
    number: float, minimum: float = 0, maximum: float = math.inf, above: float = -math.inf, below: float = math.inf
) -> str:
    """What is wrong with a number; empty where nothing is."""
    if not math.isfinite(number):
        return "must be a finite number"
    if (minimum, maximum) == (0, 1) and not 0 <= number <= 1:
        return "must lie between 0 and 1"
    if number <= above:
        return f"must be above {above}"
    if number < minimum:
        return f"must be {minimum} or more" if minimum else "must not be negative"
    if number > maximum:
        return f"must be {maximum} or less"
    return f"must be below {below}" if number >= below else ""


class _Parser(GroupedParser):
    """Raises `InputError` where argparse prints its whole usage."""

    def error(self, message: str) -> NoReturn:
        flags = [flag for action in self._actions for flag in action.option_strings]
        hints = [_nearest(word, flags) for word in message.split() if word.startswith("--")]
        raise InputError(f"{one_line(message, 500)}{''.join(hints)} (--help lists every flag)")


def _yaml_tokens(argv: list[str], known: list[str]) -> list[str]:
    """The YAML file's entries as command-line tokens, to be put before the user's own."""
    tokens: list[str] = []
    for path in _config_paths(argv):
        for key, value in _read_yaml(path).items():
            if key not in known:
                raise InputError(f"{path}: unknown key {one_line(repr(key), 80)}{_nearest(str(key), known)}")
            if value is None or value == []:
                continue
            tokens += [f"--{key}", *map(str, value)] if isinstance(value, list) else [f"--{key}={_flag_value(value)}"]
    return tokens


def _config_paths(argv: list[str]) -> list[str]:
    """The values of the last `--config` on the command line."""
    paths: list[str] = []
    for place, token in enumerate(argv):
        if token == "--config":
            paths = list(takewhile(lambda value: not value.startswith("--"), argv[place + 1 :]))
        elif token.startswith("--config="):
            paths = [token.partition("=")[2]]
    return paths


def _flag_value(value: Any) -> str:
    """A YAML value as a flag's: booleans are written as flags write them."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _read_yaml(path: str) -> dict:
    text = read_text(path)
    try:
        loaded = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise InputError(f"{path}: not valid YAML ({one_line(error)})") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise InputError(f"{path}: expected `key: value` lines")
    return loaded


def _nearest(word: str, known: list[str]) -> str:
    matches = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""
