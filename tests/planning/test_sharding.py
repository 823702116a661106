"""What DeepSpeed holds of a model, against sums by hand and against engines of two real ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from common.engine.memory import gathered_bytes
from common.engine.offload import optimizer_tensors
from common.planning.models import ModelSpec, Weights, weights_of
from common.planning.sharding import Sharding
from tests.distributed.ranks import run_on_ranks
from tests.planning.architectures import PARAMETERS, config_file
from tests.tiny_models import causal_loss, tiny_llama, zero_engine

BF16 = 2
WEIGHTS = Weights(trained=(1000, 500, 7), frozen=(300,), largest_module=1000, itemsize=BF16)


def _sharding(ranks: int, stage: int, cuda: bool = True, **zero: Any) -> Sharding:
    return Sharding.of({"zero_optimization": {"stage": stage, **zero}}, ranks, cuda)


@pytest.mark.parametrize("name", PARAMETERS)
def test_known_models_have_the_parameters_that_their_cards_say(name: str, tmp_path: Path) -> None:
    spec = ModelSpec(config_file(name, tmp_path), "causal_lm", "bf16")
    assert weights_of(spec, trained=True).total == PARAMETERS[name]


def test_zero_3_divides_weights_gradients_and_states_by_the_ranks() -> None:
    sharding = _sharding(4, 3, stage3_param_persistence_threshold=10)
    assert sharding.weights(WEIGHTS) == (250 + 125 + 2 + 75 + 7) * BF16  # the seven are on every rank as well
    assert sharding.gradients(WEIGHTS) == (250 + 125 + 2) * BF16
    assert sharding.optimizer(WEIGHTS) == (250 + 125 + 2) * (4 + 8)  # master weight, two moments
    assert sharding.gathered(WEIGHTS) == (1000 + 500 + 300) * BF16


@pytest.mark.parametrize(("stage", "gradients", "states"), [(0, 1507, 1507), (1, 1507, 377), (2, 377, 377)])
def test_lower_stages_divide_less(stage: int, gradients: int, states: int) -> None:
    sharding = _sharding(4, stage)
    assert sharding.weights(WEIGHTS) == 1807 * BF16
    assert sharding.gradients(WEIGHTS) == gradients * BF16
    assert sharding.optimizer(WEIGHTS) == states * 12
    assert sharding.gathered(WEIGHTS) == sharding.live(WEIGHTS, backward=True) == 0


def test_one_rank_gathers_nothing() -> None:
    assert _sharding(1, 3).gathered(WEIGHTS) == _sharding(1, 3).live(WEIGHTS, backward=True) == 0


def test_offloaded_states_are_on_the_host_of_a_gpu_and_where_they_were_on_cpu_ranks() -> None:
    offload = {"offload_optimizer": {"device": "cpu"}}
    on_gpu, on_cpu = _sharding(2, 3, **offload), _sharding(2, 3, cuda=False, **offload)
    assert on_gpu.optimizer(WEIGHTS) == on_gpu.gradients(WEIGHTS) == on_gpu.step(WEIGHTS) == 0
    assert on_gpu.host(WEIGHTS) == 754 * (12 + 4 + BF16)
    assert on_cpu.optimizer(WEIGHTS) == 754 * 12 and on_cpu.host(WEIGHTS) == 0


def test_a_bucket_takes_its_whole_size_on_a_gpu_and_what_is_written_on_the_cpu() -> None:
    assert _sharding(2, 3).buckets(WEIGHTS) == 500_000_000 * BF16
    assert _sharding(2, 3, cuda=False).buckets(WEIGHTS) == 1507 * BF16


def _held(rank: int, world_size: int, stage: int, bf16: bool) -> dict[str, int]:
    model = tiny_llama(hidden_size=64)
    engine = zero_engine(model.bfloat16() if bf16 else model, stage, bf16=bf16)
    engine.backward(causal_loss(engine, rank))
    engine.step()
    # A step's scalar counters are no states.
    found = {"optimizer": sum(tensor.nbytes for tensor in optimizer_tensors(engine))}
    if stage == 3:
        weights = list(engine.module.parameters())
        persistent = [weight.ds_numel * weight.element_size() for weight in weights if weight.ds_persist]
        found["weights"] = sum(weight.ds_tensor.nbytes for weight in weights) + sum(persistent)
        found["gradients"] = engine.optimizer.grad_partitions_flat_buffer.nbytes
        found["gathered"] = gathered_bytes(engine)
    return found


@pytest.mark.distributed
@pytest.mark.parametrize(("stage", "bf16"), [(1, True), (2, False), (3, False), (3, True)])
def test_engines_of_two_ranks_hold_what_is_planned(stage: int, bf16: bool, tmp_path: Path) -> None:
    tiny_llama(hidden_size=64).config.save_pretrained(tmp_path)
    weights = weights_of(ModelSpec(str(tmp_path), "causal_lm", "bf16" if bf16 else "fp32"), trained=True)
    sharding = _sharding(2, stage, cuda=False, stage3_param_persistence_threshold=100)
    for found in run_on_ranks(_held, 2, stage, bf16):
        for name, size in found.items():
            # Shards are padded to a few elements each.
            assert getattr(sharding, name)(weights) == pytest.approx(size, rel=0.01), name
