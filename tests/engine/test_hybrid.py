"""The hybrid engine on two real ZeRO-3 ranks: what it generates, and that training never notices."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from common.engine.hybrid import HybridEngine
from common.models.generate import generate_responses
from tests.distributed.ranks import run_on_ranks
from tests.tiny_models import SEQUENCES, causal_loss, ordinary_tokenizer, tiny_llama, zero_engine

pytestmark = pytest.mark.distributed


def _ids(hybrid_or_module: Any, synced: bool = False) -> list[list[int]]:
    generated = generate_responses(
        hybrid_or_module, ordinary_tokenizer(), SEQUENCES, max_new_tokens=6, temperature=0, seed=0, batch_size=4,
        synced=synced,
    )
    return [response.ids for response in generated]


def _train(hybrid: HybridEngine, rank: int) -> float:
    loss = causal_loss(hybrid.engine, rank)
    hybrid.engine.backward(loss)
    hybrid.engine.step()
    return float(loss)


def _modes(rank: int, world_size: int) -> dict[str, Any]:
    plain = tiny_llama()
    hybrid = HybridEngine(zero_engine(tiny_llama()))
    found: dict[str, Any] = {"plain": _ids(plain)}
    with hybrid.inference() as module:
        found["gathered"] = _ids(module)
    hybrid.weights = "sharded"
    with hybrid.inference() as module:
        found["sharded"] = _ids(module, synced=True)
    hybrid.weights = "gathered"
    for _ in range(3):
        _train(hybrid, rank)
    with hybrid.inference() as module:
        found["after training"] = _ids(module)
        weights = {name: value.detach().clone() for name, value in module.named_parameters()}
    trained = tiny_llama()
    trained.load_state_dict(weights, strict=False)
    found["plain with the new weights"] = _ids(trained)
    return found


def test_gathered_sharded_and_plain_generation_agree_token_by_token() -> None:
    for found in run_on_ranks(_modes, 2):
        assert found["gathered"] == found["plain"]
        assert found["sharded"] == found["plain"]
        assert found["after training"] == found["plain with the new weights"]
        assert found["after training"] != found["plain"]


def _uneven(rank: int, world_size: int) -> int:
    """Rank 1 generates five times as much as rank 0 while the weights are gathered."""
    hybrid = HybridEngine(zero_engine(tiny_llama()))
    with hybrid.inference() as module:
        for _ in range(1 + 4 * rank):
            _ids(module)
    return len(_ids_after_training(hybrid, rank))


def _ids_after_training(hybrid: HybridEngine, rank: int) -> list[list[int]]:
    _train(hybrid, rank)
    with hybrid.inference() as module:
        return _ids(module)


def test_ranks_may_generate_different_amounts() -> None:
    assert run_on_ranks(_uneven, 2) == [4, 4]


def _losses(rank: int, world_size: int, disturbance: str) -> tuple[list[float], list[str]]:
    hybrid = HybridEngine(zero_engine(tiny_llama()))
    losses = [_train(hybrid, rank), _train(hybrid, rank)]
    before = _state(hybrid)
    if disturbance == "switch":
        with hybrid.inference() as module:
            _ids(module)
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


@pytest.mark.parametrize("disturbance", ["switch", "exception"])
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
