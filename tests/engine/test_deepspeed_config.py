"""A user's own DeepSpeed file: `auto` is what the flags give; what contradicts them is refused alike in all steps."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from deepspeed.runtime.config import DeepSpeedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from common.engine.deepspeed_config import inference_config, training_config, zero_stage
from common.engine.training_arguments import training_arguments
from common.errors import InputError
from step1_sft.config import SftConfig
from step3_tppo.config import Step3Config
from tests.step3.runs import run, write_inputs

# The file that transformers' documentation gives for ZeRO-3.
USUAL = {
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16},
    "optimizer": {
        "type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_num_steps": "auto"}},
    "zero_optimization": {
        "stage": 3, "overlap_comm": False, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto", "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "steps_per_print": 2000,
    "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto",
}  # fmt: skip


def usual(folder: Path, *keys: str, value: Any = None) -> str:
    """A file like `USUAL`, with `value` at the nested `keys`."""
    config = copy.deepcopy(USUAL)
    section = config
    for key in keys[:-1]:
        section = section.setdefault(key, {})
    if keys:
        section[keys[-1]] = value
    path = folder / "ds.json"
    path.write_text(json.dumps(config))
    return str(path)


def settings(path: str, dtype: str = "fp32") -> dict[str, Any]:
    config = Step3Config(deepspeed_config=path, dtype=dtype)
    return training_config(config, micro_batch_size=4, world_size=2, max_grad_norm=1.0)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_auto_is_what_the_flags_give(tmp_path: Path, dtype: str) -> None:
    found = settings(usual(tmp_path), dtype)
    assert "auto" not in json.dumps(found) and "optimizer" not in found and "scheduler" not in found
    with mock.patch("deepspeed.runtime.config.dist") as dist:
        dist.get_world_size.return_value, dist.get_rank.return_value = 2, 0
        read = DeepSpeedConfig(found)
        frozen = DeepSpeedConfig(
            inference_config(Step3Config(deepspeed_config=usual(tmp_path), dtype=dtype), world_size=2)
        )
    for config in (read, frozen):
        assert config.bfloat16_config.enabled == (dtype == "bf16") and not config.float16_config.enabled
        assert config.zero_config.stage == 3
    assert (read.train_batch_size, read.train_micro_batch_size_per_gpu, read.gradient_clipping) == (8, 4, 1.0)
    assert zero_stage(Step3Config(deepspeed_config=usual(tmp_path))) == 3


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("bf16", "enabled"), True, "bf16.enabled is true, but --dtype is fp32"),
        (("fp16", "enabled"), True, "fp16.enabled is true, but --dtype is fp32"),
        (("train_micro_batch_size_per_gpu",), 16, "train_micro_batch_size_per_gpu is 16, by the flags 4"),
        (("gradient_accumulation_steps",), 8, "gradient_accumulation_steps is 8, by the flags 1"),
        (("gradient_clipping",), 0.5, "gradient_clipping is 0.5, by the flags 1.0"),
        (("optimizer", "params", "lr"), 1e-4, "optimizer has params of its own"),
    ],
)
def test_what_contradicts_the_flags_is_refused(tmp_path: Path, keys: tuple[str, ...], value: Any, message: str) -> None:
    path = usual(tmp_path, *keys, value=value)
    with pytest.raises(InputError) as error:
        settings(path)
    assert str(error.value) == f"{path} contradicts the flags: {error.value.args[0].split(': ', 1)[1]}"
    assert message in str(error.value) and "Write 'auto' there, or set the flags alike" in str(error.value)
    if "optimizer" in keys:
        return  # the Trainer would take it
    try:
        with pytest.raises(InputError, match=r"contradicts the flags: .*Write 'auto' there, or set the flags alike"):
            training_arguments(SftConfig(deepspeed_config=path, output_dir=str(tmp_path / "out"), dtype="fp32"))
    finally:
        unset_hf_deepspeed_config()


@pytest.mark.distributed
def test_step_3_with_such_a_file_makes_the_same_models_as_with_flags(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "inputs")
    for name, flags in (("flags", ()), ("file", ("--deepspeed_config", usual(tmp_path)))):
        assert [status for status, _ in run(inputs, tmp_path / name, "--dtype", "fp32", *flags)] == [0, 0]
    by_flags, by_file = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("flags", "file")
    )
    assert len(by_flags) == len(by_file) > 0
    for expected, found in zip(by_flags, by_file, strict=True):
        for key in ("loss/policy", "loss/value", "kl/per_sequence", "policy/grad_norm"):
            assert found[key] == pytest.approx(expected[key], rel=1e-5, abs=1e-8)
