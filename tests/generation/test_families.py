"""Greedy decoding equals transformers' own `generate`, token by token, for the families of causal language models."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from common.generation.generate import generate_responses
from common.generation.sampling import Sampling
from tests.tiny_models import VOCABULARY, ordinary_tokenizer

SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
    "initializer_range": 0.2, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1,
}
WINDOW = 7  # shorter than prompts and responses here, so that it cuts
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {},
    "qwen2, some layers with a window": {
        "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1,
    },
    "qwen3": {},
    "gemma": {},
    "gemma2": {"sliding_window": WINDOW, "query_pre_attn_scalar": 8, "attn_implementation": "eager"},
    "gemma3_text": {"sliding_window": WINDOW, "query_pre_attn_scalar": 8},
    "phi": {},
    "phi3": {},
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "granite": {},
}
PROMPTS = [[7, 8, 9, 30, 31], [12], [40, 41], [9, 9, 9, 9, 9, 9, 9, 60, 61, 62, 63], [100, 101, 102]]


def family_model(family: str) -> torch.nn.Module:
    changes = dict(FAMILIES[family])
    kernel = changes.pop("attn_implementation", "sdpa")
    config = AutoConfig.for_model(family.split(",")[0], **SIZES | changes)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=kernel).eval()


@torch.no_grad()
def generated_alone(model: torch.nn.Module, prompt: list[int], count: int) -> list[int]:
    """What transformers generates from one prompt without padding."""
    settings = GenerationConfig(max_new_tokens=count, eos_token_id=0, pad_token_id=1, do_sample=False)
    return model.generate(torch.tensor([prompt]), generation_config=settings)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_generate(family: str) -> None:
    model = family_model(family)
    expected = [generated_alone(model, prompt, 20) for prompt in PROMPTS for _ in range(2)]
    assert len({tuple(response) for response in expected}) > 3, "all alike: the test proves little"
    for rows in (2, 3, 10):
        found = generate_responses(model, ordinary_tokenizer(), PROMPTS, Sampling(20, 0.0, samples=2), rows)
        assert [response.ids for response in found] == expected


def test_a_kernel_without_masks_gives_way_while_generating_and_comes_back() -> None:
    model = family_model("llama")
    expected = [generated_alone(model, prompt, 5) for prompt in PROMPTS]
    model.config._attn_implementation = "flash_attention_2"  # cannot run here: it would fail if it were asked to
    found = generate_responses(model, ordinary_tokenizer(), PROMPTS, Sampling(5, 0.0), 4)
    assert [response.ids for response in found] == expected
    assert model.config._attn_implementation == "flash_attention_2"
