"""The hybrid engine on two real ZeRO-3 ranks: what it generates, and that training never notices."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from common.config import LoraOptions
from common.engine.adapters import merged_adapters
from common.engine.hybrid import HybridEngine
from common.engine.memory import WeightMode, gathered_bytes, weights_that_fit
from common.engine.offload import optimizer_tensors, resting_optimizers
from common.generation.generate import generate_responses
from common.generation.sampling import Sampling
from common.models.loading import apply_lora
from tests.distributed.ranks import run_on_ranks
from tests.tiny_models import SEQUENCES, causal_loss, ordinary_tokenizer, tiny_llama, zero_engine

pytestmark = pytest.mark.distributed


def _ids(hybrid: HybridEngine, temperature: float = 0.0) -> list[list[int]]:
    made = hybrid.generate(ordinary_tokenizer(), SEQUENCES, Sampling(6, temperature, samples=2, seed=3), rows=4)
    return [response.ids for response in made]


def _plain_ids(model: torch.nn.Module, temperature: float = 0.0) -> list[list[int]]:
    made = generate_responses(
        model, ordinary_tokenizer(), SEQUENCES, Sampling(6, temperature, samples=2, seed=3), rows=4
    )
    return [response.ids for response in made]


def _train(hybrid: HybridEngine, rank: int) -> float:
    loss = causal_loss(hybrid.engine, rank)
    hybrid.engine.backward(loss)
    hybrid.engine.step()
    return float(loss)


def _modes(rank: int, world_size: int, stage: int, temperature: float) -> dict[str, Any]:
    hybrid = HybridEngine(zero_engine(tiny_llama(), stage))
    found: dict[str, Any] = {"plain": _plain_ids(tiny_llama(), temperature)}
    with hybrid.inference():
        found["gathered"] = _ids(hybrid, temperature)
    hybrid.weights = "sharded"
    with hybrid.inference():
        found["sharded"] = _ids(hybrid, temperature)
    hybrid.weights = "gathered"
    for _ in range(3):
        _train(hybrid, rank)
    with hybrid.inference() as module:
        found["after training"] = _ids(hybrid, temperature)
        weights = {name: value.detach().clone() for name, value in module.named_parameters()}
    trained = tiny_llama()
    trained.load_state_dict(weights, strict=False)
    found["plain with the new weights"] = _plain_ids(trained, temperature)
    return found


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_gathered_sharded_and_plain_generation_agree_token_by_token(stage: int, temperature: float) -> None:
    for found in run_on_ranks(_modes, 2, stage, temperature):
        assert found["gathered"] == found["plain"]
        assert found["sharded"] == found["plain"]
        assert found["after training"] == found["plain with the new weights"]
        assert found["after training"] != found["plain"]


def _in_bf16(rank: int, world_size: int, stage: int) -> tuple[list[list[int]], list[list[int]], str]:
    """Greedy responses of a bf16 engine and of a plain bf16 model with its weights, and the dtype of the former."""
    hybrid = HybridEngine(zero_engine(tiny_llama().bfloat16(), stage, bf16=True))
    _train(hybrid, rank)
    with hybrid.inference() as module:
        found = _ids(hybrid)
        weights = {name: value.detach().clone() for name, value in module.named_parameters()}
    plain = tiny_llama().bfloat16()
    plain.load_state_dict(weights, strict=False)
    return found, _plain_ids(plain), str(next(iter(weights.values())).dtype)


@pytest.mark.parametrize("stage", [1, 3])
def test_bf16_engines_generate_what_their_weights_do(stage: int) -> None:
    for found, plain, dtype in run_on_ranks(_in_bf16, 2, stage):
        assert found == plain
        assert dtype == "torch.bfloat16"


def _uneven(rank: int, world_size: int, weights: WeightMode) -> int:
    """Rank 1 has five times as many prompts as rank 0."""
    hybrid = HybridEngine(zero_engine(tiny_llama()))
    hybrid.weights = weights
    tokenizer, count = ordinary_tokenizer(), 1 + 4 * rank
    with hybrid.inference():
        made = hybrid.generate(tokenizer, SEQUENCES * count, Sampling(3 + 20 * rank, 0.0), rows=2 + rank)
    with hybrid.inference():
        # Nothing of the other rank's longer work is left over.
        assert [response.ids for response in made[:4]] == [
            response.ids for response in hybrid.generate(tokenizer, SEQUENCES, Sampling(3 + 20 * rank, 0.0), rows=4)
        ]
    _train(hybrid, rank)
    return len(made)


@pytest.mark.parametrize("weights", ["gathered", "sharded"])
def test_ranks_may_generate_different_amounts(weights: str) -> None:
    assert run_on_ranks(_uneven, 2, weights) == [4, 20]


def _losses(rank: int, world_size: int, disturbance: str) -> tuple[list[float], list[str]]:
    hybrid = HybridEngine(zero_engine(tiny_llama()))
    losses = [_train(hybrid, rank), _train(hybrid, rank)]
    before = _state(hybrid)
    if disturbance == "switch":
        with hybrid.inference():
            _ids(hybrid)
    elif disturbance == "offload":
        with resting_optimizers(hybrid.engine), hybrid.inference():
            _ids(hybrid)
    elif disturbance == "exception":
        with pytest.raises(KeyError), hybrid.inference() as module:
            module(torch.tensor([[1, 2, 3]]))
            raise KeyError("in the middle of a rollout")
    assert _state(hybrid) == before
    assert hybrid.module.training
    return losses + [_train(hybrid, rank) for _ in range(3)], before[1]


def _state(hybrid: HybridEngine) -> tuple[list[tuple], list[str]]:
    """Hooks of every module in order, and where each parameter rests."""
    hooks = [
        (name, tuple(module._forward_pre_hooks), tuple(module._forward_hooks))
        for name, module in hybrid.module.named_modules()
    ]
    return hooks, [str(parameter.ds_status) for parameter in hybrid.module.parameters()]


@pytest.mark.parametrize("disturbance", ["switch", "offload", "exception"])
def test_training_after_a_switch_equals_training_without_one(disturbance: str) -> None:
    undisturbed = run_on_ranks(_losses, 2, "none")
    disturbed = run_on_ranks(_losses, 2, disturbance)
    for (losses, rest), (plain_losses, _) in zip(disturbed, undisturbed, strict=True):
        assert losses == plain_losses  # to the last bit
        assert any("NOT_AVAILABLE" in status for status in rest), "nothing was sharded: the test proves nothing"


def _nested(rank: int, world_size: int) -> str:
    hybrid = HybridEngine(zero_engine(tiny_llama()))
    with hybrid.inference(), pytest.raises(RuntimeError) as error, hybrid.inference():
        pass
    return str(error.value)


def test_nesting_is_refused() -> None:
    assert "already entered" in run_on_ranks(_nested, 2)[0]


def _outside(rank: int, world_size: int) -> str:
    hybrid = HybridEngine(zero_engine(tiny_llama()))
    with pytest.raises(RuntimeError) as error:
        _ids(hybrid)
    return str(error.value)


def test_generating_outside_inference_is_refused() -> None:
    assert "needs inference() around it" in run_on_ranks(_outside, 2)[0]


class _Broken(Exception):
    pass


def _adapters(rank: int, world_size: int, stage: int, variant: dict[str, bool]) -> dict[str, Any]:
    """Rollouts with adapters merged, and every weight before and after, one rollout ending in an exception."""
    model = apply_lora(tiny_llama(), LoraOptions(lora_r=4, **variant))
    hybrid = HybridEngine(zero_engine(model, stage, learning_rate=0.1))
    for _ in range(3):
        _train(hybrid, rank)
    found: dict[str, Any] = {}
    with hybrid.inference() as module:
        before = {name: value.detach().clone() for name, value in module.named_parameters()}
        with hybrid.module.disable_adapter():
            found["base"] = _plain_ids(hybrid.module)
        found["unmerged"] = _plain_ids(hybrid.module)  # adapters beside the layers
        found["merged"] = _ids(hybrid)
        with merged_adapters(module):
            found["ours"] = _adapted_weights(module)
        found["peft's"] = _adapted_weights(copy.deepcopy(module).merge_and_unload())
        calls = []
        hook = module.get_base_model().lm_head.register_forward_hook(lambda *_: calls.append(1) or _break(calls))
        with pytest.raises(_Broken):
            _ids(hybrid)
        hook.remove()
        after = {name: value.detach().clone() for name, value in module.named_parameters()}
        found["changed"] = [name for name in before if not torch.equal(before[name], after[name])]
        found["again"] = _plain_ids(hybrid.module)
    found["losses"] = [_train(hybrid, rank) for _ in range(2)]
    return found


def _break(calls: list[int]) -> None:
    if len(calls) == 3:
        raise _Broken


def _adapted_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights of the linear layers, by the names that they have without adapters."""
    named = {name.replace(".base_layer", "").removeprefix("base_model.model."): value
             for name, value in model.named_parameters() if "lora_" not in name}  # fmt: skip
    return {name: value.detach().clone() for name, value in named.items() if "_proj" in name}


@pytest.mark.parametrize("variant", [{}, {"lora_rslora": True}, {"lora_dora": True}], ids=str)
@pytest.mark.parametrize("stage", [1, 3])
def test_adapters_are_merged_for_the_rollout_and_leave_no_trace(stage: int, variant: dict[str, bool]) -> None:
    for found in run_on_ranks(_adapters, 2, stage, variant):
        assert len(found["ours"]) == 14 and found["ours"].keys() == found["peft's"].keys()
        for name, weight in found["ours"].items():
            assert torch.equal(weight, found["peft's"][name]), name
        assert found["merged"] == found["unmerged"] == found["again"] != found["base"]
        assert found["changed"] == []  # to the last bit
        assert all(torch.isfinite(torch.tensor(found["losses"])))


def _resting(rank: int, world_size: int, stage: int) -> tuple[int, int, bool]:
    """Bytes that moved, bytes that Adam's moments and fp32 masters have, and whether they came back as they were."""
    engine = zero_engine(tiny_llama(), stage)
    _train(HybridEngine(engine), rank)
    tensors = optimizer_tensors(engine)
    before = [(tensor.data_ptr(), tensor.clone()) for tensor in tensors]
    with resting_optimizers(engine):
        moved = sum(
            tensor.numel() for tensor, (place, _) in zip(tensors, before, strict=True) if tensor.data_ptr() != place
        )
    same = all(torch.equal(tensor, value) for tensor, (_, value) in zip(tensors, before, strict=True))
    total = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in engine.module.parameters())
    return moved, total, same


@pytest.mark.parametrize(("stage", "kinds"), [(0, 2), (1, 3), (3, 3)])
def test_what_rests_in_host_memory_is_all_that_optimisers_hold(stage: int, kinds: int) -> None:
    """Two moments and, where weights are sharded, a master copy: of all weights at stage 0, of half of them else."""
    for moved, total, same in run_on_ranks(_resting, 2, stage):
        assert same
        share = 1 if stage == 0 else 2
        assert moved == pytest.approx(kinds * total / share, rel=0.01)  # shards are padded


def _estimate(rank: int, world_size: int) -> tuple[int, int, str, str]:
    engine = zero_engine(tiny_llama())
    with HybridEngine(engine).inference() as module:
        partitioned = sum(
            parameter.numel() * 4 for parameter in module.parameters() if not getattr(parameter, "ds_persist", False)
        )
    needed = gathered_bytes(engine)
    # Room on this rank, none on the other: all must decide alike.
    tight, _ = weights_that_fit(needed, 1000, free=10 * needed if rank == 0 else needed)
    roomy, reason = weights_that_fit(needed, 1000, free=10 * needed)
    return needed, partitioned, tight, f"{roomy}: {reason}"


def test_the_memory_estimate_counts_what_is_gathered_and_the_fullest_rank_decides() -> None:
    for needed, partitioned, tight, roomy in run_on_ranks(_estimate, 2):
        assert needed == partitioned > 0
        assert tight == "sharded"
        assert roomy.startswith("gathered: rollout weights: gathered") and "--hybrid_weights overrules" in roomy
