"""Which settings of adapters go together."""

from __future__ import annotations

import json

import pytest

from common.engine.adapter_options import check_adapters, check_dora
from common.errors import InputError
from step1_sft.config import SftConfig

QLORA = {"lora_r": 16, "quantize": "nf4", "dtype": "bf16", "zero_stage": 2}


def test_every_variant_and_both_together_are_accepted() -> None:
    for settings in ({}, {"lora_r": 4}, {"lora_r": 4, "lora_dora": True, "lora_rslora": True}, QLORA):
        check_adapters(SftConfig(**settings))
    check_adapters(SftConfig(**QLORA | {"lora_dora": True, "lora_rslora": True}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_dora": True}, "--lora_dora is for adapters and there are none; add --lora_r"),
        ({"lora_rslora": True}, "--lora_rslora is for adapters"),
        (QLORA | {"lora_r": 0}, "adapters must learn; add --lora_r"),
        (QLORA | {"dtype": "fp32"}, "computes in bf16, not fp32; add --dtype bf16"),
        (QLORA | {"zero_stage": 3}, "use --zero_stage 2"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_adapters(SftConfig(**settings))


def test_dora_is_refused_where_it_would_meet_sharded_weights() -> None:
    dora = {"lora_r": 4, "lora_dora": True}
    check_dora(SftConfig(**dora))
    check_dora(SftConfig(**dora, gradient_checkpointing=True, zero_stage=2))
    check_dora(SftConfig(lora_r=4, gradient_checkpointing=True))
    with pytest.raises(InputError, match="--lora_dora with --gradient_checkpointing cannot run under ZeRO-3"):
        check_dora(SftConfig(**dora, gradient_checkpointing=True))


def test_the_stage_of_the_users_own_deepspeed_file_counts(tmp_path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    with pytest.raises(InputError, match="use --zero_stage 2"):
        check_adapters(SftConfig(**QLORA, deepspeed_config=str(path)))
