from __future__ import annotations

from dataclasses import replace

import pytest

from common.errors import InputError
from step3_tppo.config import Step3Config

GOOD = Step3Config(
    output_dir="o", actor_path="a", reward_path="r", data_dir="d", rollout_batch_size=32, mini_batch_size=16,
    micro_batch_size=4,
)


def test_good_settings() -> None:
    GOOD.validate(world_size=2)
    # A minibatch need not be whole micro-batches: the last one is smaller.
    replace(GOOD, micro_batch_size=7).validate(world_size=2)


@pytest.mark.parametrize(
    ("change", "world_size", "message"),
    [
        ({"actor_path": ""}, 2, "--actor_path is missing"),
        ({"rollout_batch_size": 33}, 2, "rollout_batch_size is 33, which the number of ranks (2)"),
        ({"mini_batch_size": 13}, 2, "mini_batch_size is 13, which the number of ranks (2)"),
        ({"micro_batch_tokens": -1}, 2, "--micro_batch_tokens must not be negative"),
        ({"offload_states": True, "offload": "optimizer"}, 2, "--offload_states has nothing to move"),
        ({"mini_batch_size": 24}, 2, "rollout_batch_size x samples_per_prompt is 32, which mini_batch_size (24)"),
        ({"temperature": 0.0}, 2, "--temperature must be above 0"),
        ({"line_gamma": -0.5}, 2, "--line_gamma must lie between 0 and 1"),
        ({"actor_learning_rate": float("nan")}, 2, "--actor_learning_rate must be a finite number, not nan"),
        ({"clip_range": 0.0}, 2, "--clip_range must be above 0"),
        ({"lora_dropout": 1.0}, 2, "--lora_dropout must be below 1"),
        ({"reward_from": "monitor"}, 2, "--reward_from monitor needs --monitor"),
        ({}, 3, "the number of ranks (3) does not divide"),
    ],
)
def test_settings_that_cannot_work(change: dict, world_size: int, message: str) -> None:
    with pytest.raises(InputError) as error:
        replace(GOOD, **change).validate(world_size)
    assert message in str(error.value)
