"""QLoRA. bitsandbytes computes on CPUs too, slowly: where it is installed, the numbers are checked on two ranks."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from common.config import LoraOptions, ModelOptions
from common.engine.hybrid import HybridEngine
from common.generation.generate import generate_responses
from common.generation.sampling import Sampling
from common.models.loading import apply_lora, load_causal_lm, save_model_folder
from common.models.quantization import is_packed, quantization_config, unpacked_state
from tests.distributed.ranks import run_on_ranks
from tests.tiny_models import SEQUENCES, causal_loss, ordinary_tokenizer, tiny_llama, zero_engine

IDS = torch.tensor([[5, 6, 7, 8, 30, 31]])
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (requirements-gpu.txt)"
)


def test_nf4_with_quantised_constants_computing_in_bf16() -> None:
    assert quantization_config("none") is None
    config = quantization_config("nf4").to_dict()
    assert config["load_in_4bit"] and config["bnb_4bit_use_double_quant"]
    assert (config["bnb_4bit_quant_type"], config["bnb_4bit_compute_dtype"]) == ("nf4", "bfloat16")


def test_ordinary_weights_are_not_packed_and_unpack_to_themselves() -> None:
    model = tiny_llama()
    assert not any(map(is_packed, model.parameters()))
    state = unpacked_state(model)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def _load_in_4_bits(path: str) -> nn.Module:
    with mock.patch("common.models.quantization.require_cuda"):
        model = load_causal_lm(path, ModelOptions(dtype="bf16"), "nf4")
    for module in model.modules():
        # On some CPUs bitsandbytes lays weights out anew in eval mode, and peft would no longer read them.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def _qlora(rank: int, world_size: int, folder: str, dora: bool) -> dict[str, Any]:
    """Three steps of adapters over 4-bit weights under ZeRO-2, a rollout, and an export by rank 0."""
    model = apply_lora(_load_in_4_bits(f"{folder}/base"), LoraOptions(lora_r=4, lora_dora=dora, lora_rslora=True))
    hybrid = HybridEngine(zero_engine(model, stage=2, bf16=True))
    before = {name: value.clone() for name, value in unpacked_state(model).items()}
    losses = []
    for _ in range(3):
        loss = causal_loss(hybrid.engine, rank)
        hybrid.engine.backward(loss)
        hybrid.engine.step()
        losses.append(float(loss.detach()))
    after = unpacked_state(model)
    found = {
        "packed": sum(map(is_packed, model.parameters())),
        "losses": losses,
        "changed": {name for name, value in after.items() if not torch.equal(value, before[name])},
    }
    with hybrid.inference() as module:
        sampling, tokenizer = Sampling(6, 0.0, samples=1, seed=3), ordinary_tokenizer()
        found["rollout"] = [made.ids for made in hybrid.generate(tokenizer, SEQUENCES, sampling, rows=4)]
        found["unmerged"] = [made.ids for made in generate_responses(module, tokenizer, SEQUENCES, sampling, rows=4)]
        found["logits"] = module(IDS).logits.float()
    if rank == 0:
        save_model_folder(model, tokenizer, f"{folder}/tuned", {}, hybrid.module.state_dict())
    torch.distributed.barrier()
    return found


@needs_bitsandbytes
@pytest.mark.distributed
@pytest.mark.parametrize("dora", [False, True])
def test_adapters_learn_over_4_bits_and_the_export_is_what_was_trained(tmp_path: Path, dora: bool) -> None:
    base = tiny_llama(hidden_size=64, intermediate_size=128)
    save_model_folder(base, ordinary_tokenizer(), tmp_path / "base", {})
    first, second = run_on_ranks(_qlora, 2, str(tmp_path), dora)
    assert first["packed"] == 14
    assert all("lora_" in name for name in first["changed"]) and first["changed"]
    assert first["losses"][-1] < 0.6 * first["losses"][0]
    assert first["rollout"] == first["unmerged"] == second["rollout"]
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    assert not hasattr(exported.config, "quantization_config")
    with torch.no_grad():
        merged = exported.eval()(IDS).logits.float()
        start = base.eval()(IDS).logits
    # bf16 has 8 bits of mantissa: 2^-8 of logits up to 7, over two layers and the head; the adapters move them by ten.
    assert torch.allclose(merged, first["logits"], rtol=0, atol=0.4)
    assert (merged - start).abs().max() > 3
