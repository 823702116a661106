"""DeepSpeed's JSON from our few flags, or from the user's own file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from common.errors import InputError
from common.files import read_json

AUTO = "auto"  # in a user's file, as transformers reads it: what the flags give, or DeepSpeed's default


class EngineOptions(Protocol):
    """The flags read here: `ZeroOptions` and the dtype of `ModelOptions`."""

    zero_stage: int
    offload: str
    deepspeed_config: str
    dtype: str


def trainer_deepspeed_config(options: EngineOptions) -> dict[str, Any]:
    """Settings for `transformers.TrainingArguments(deepspeed=...)`; the Trainer fills in the `auto` values, and finds
    what contradicts the flags."""
    if options.deepspeed_config:
        return {"bf16": {"enabled": AUTO}} | _read(options.deepspeed_config)
    return _common(options) | {
        "train_batch_size": AUTO,
        "train_micro_batch_size_per_gpu": AUTO,
        "gradient_accumulation_steps": AUTO,
        "gradient_clipping": AUTO,
    }


def training_config(
    options: EngineOptions, *, micro_batch_size: int, world_size: int, max_grad_norm: float
) -> dict[str, Any]:
    """Settings for an engine that trains with an optimizer and a schedule of its caller's; batch sizes in sequences.

    Accumulation is not DeepSpeed's to count: an optimiser step has as many micro-batches as its tokens need, see
    `common.engine.accumulation`. Raises `InputError` where the user's own file contradicts the flags.
    """
    flags = {
        "train_batch_size": micro_batch_size * world_size,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm,
    }
    base = _base(options)
    contradictions = [
        f"{name} is {base[name]}, by the flags {value}"
        for name, value in flags.items()
        if base.get(name, value) != value
    ]
    for name in ("optimizer", "scheduler"):
        if base.pop(name, {}).get("params"):
            contradictions.append(f"{name} has params of its own, which flags set here")
    if contradictions:
        raise contradiction(options.deepspeed_config, contradictions)
    return base | flags


def inference_config(options: EngineOptions, *, world_size: int) -> dict[str, Any]:
    """Settings for a frozen model: sharded as ZeRO-3 where the trained models are, whole otherwise.

    ZeRO-1 and 2 shard what only training has (optimizer states, gradients), so a frozen model needs stage 0 there.
    """
    base = _base(options)
    zero = base.get("zero_optimization", {})
    config = {key: base[key] for key in ("bf16", "fp16") if key in base}
    if zero.get("stage") == 3:
        kept = {key: value for key, value in zero.items() if key != "offload_optimizer"}
        config["zero_optimization"] = kept
    return config | {"train_micro_batch_size_per_gpu": 1, "train_batch_size": world_size}


def zero_stage(options: EngineOptions) -> int:
    """The ZeRO stage that the flags, or the user's own file, ask for."""
    return _settings(options).get("zero_optimization", {}).get("stage", 0)


def contradiction(path: str, found: Sequence[str]) -> InputError:
    """The error of a user's DeepSpeed file that says other than the flags."""
    return InputError(f"{path} contradicts the flags: {'; '.join(found)}. Write 'auto' there, or set the flags alike")


def _base(options: EngineOptions) -> dict[str, Any]:
    """What the flags make, or the user's own file without `auto` and with the flags' precision."""
    base = _settings(options)
    if not options.deepspeed_config:
        return base
    precisions = {"bf16": options.dtype == "bf16", "fp16": False}
    contradictions = []
    for name, enabled in precisions.items():
        section = base.setdefault(name, {})
        if section.setdefault("enabled", enabled) != enabled:
            contradictions.append(f"{name}.enabled is {str(not enabled).lower()}, but --dtype is {options.dtype}")
    if contradictions:
        raise contradiction(options.deepspeed_config, contradictions)
    return base


def _settings(options: EngineOptions) -> dict[str, Any]:
    """What the flags make, or the user's own file without `auto`."""
    return _without_auto(_read(options.deepspeed_config)) if options.deepspeed_config else _common(options)


def _without_auto(value: dict[str, Any]) -> dict[str, Any]:
    """A copy of settings without the entries that are `auto`, at any depth."""
    return {
        name: _without_auto(entry) if isinstance(entry, dict) else entry
        for name, entry in value.items()
        if entry != AUTO
    }


def _common(options: EngineOptions) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": options.zero_stage}
    if options.offload == "all" and options.zero_stage != 3:
        raise InputError("--offload all moves parameters too, which only --zero_stage 3 can; use --offload optimizer")
    if options.offload != "none" and options.zero_stage == 0:
        raise InputError("--offload needs --zero_stage 1, 2 or 3: stage 0 shards nothing")
    if options.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if options.offload == "all":
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    if options.zero_stage == 3:
        # The consolidated weights are what a Hugging Face folder holds.
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    return {
        "zero_optimization": zero,
        "bf16": {"enabled": options.dtype == "bf16"},
        # torch.optim.AdamW with offloaded states: slower than DeepSpeed's CPU Adam, but it needs no compiler.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,
    }


def _read(path: str) -> dict[str, Any]:
    config = read_json(path)
    if not isinstance(config, dict):
        raise InputError(f"{path}: a DeepSpeed config is a JSON object")
    return config
