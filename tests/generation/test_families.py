"""Greedy decoding equals transformers' own `generate`, token by token, for the families of causal language models."""

from __future__ import annotations

import pytest
import torch
from transformers import AddedToken, GenerationConfig

from common.alignment import TokenDecoder
from common.generation.generate import generate_responses
from common.generation.sampling import Sampling
from tests.families import ACTORS, family_model
from tests.tiny_models import ordinary_tokenizer

PROMPTS = [[7, 8, 9, 30, 31], [12], [40, 41], [9, 9, 9, 9, 9, 9, 9, 60, 61, 62, 63], [100, 101, 102]]


@torch.no_grad()
def generated_alone(model: torch.nn.Module, prompt: list[int], count: int, ends: int | list[int] = 0) -> list[int]:
    """What transformers generates from one prompt without padding."""
    settings = GenerationConfig(max_new_tokens=count, eos_token_id=ends, pad_token_id=1, do_sample=False)
    return model.generate(torch.tensor([prompt]), generation_config=settings)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", ACTORS)
def test_greedy_equals_generate(family: str) -> None:
    model = family_model(family)
    expected = [generated_alone(model, prompt, 20) for prompt in PROMPTS for _ in range(2)]
    assert len({tuple(response) for response in expected}) > 3, "all alike: the test proves little"
    for rows in (2, 3, 10):
        found = generate_responses(model, ordinary_tokenizer(), PROMPTS, Sampling(20, 0.0, samples=2), rows)
        assert [response.ids for response in found] == expected


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi"])
def test_any_end_token_of_the_model_ends_a_response(family: str) -> None:
    """gemma-3-it lists <eos> and <end_of_turn>, Llama-3-Instruct three; the tokenizer has one EOS."""
    model, tokenizer = family_model(family), ordinary_tokenizer()
    unended = [generated_alone(model, prompt, 20) for prompt in PROMPTS]
    turn, word = unended[0][7], unended[1][3]  # tokens that come up
    assert turn != word
    tokenizer.add_tokens(AddedToken(tokenizer.convert_ids_to_tokens(turn), special=True), special_tokens=True)
    model.generation_config.eos_token_id = [0, turn]
    expected = [generated_alone(model, prompt, 20, [0, turn]) for prompt in PROMPTS]
    assert len(expected[0]) <= 8 and expected != unended
    found = generate_responses(model, tokenizer, PROMPTS, Sampling(20, 0.0), 3)
    assert [response.ids for response in found] == expected
    assert [response.finished for response in found] == [ids[-1] in (0, turn) for ids in expected]
    assert found[0].text == TokenDecoder(tokenizer)(found[0].ids[:-1]).text, "the end token is no part of the text"
    # The default of an architecture may be the id of an ordinary word.
    model.generation_config.eos_token_id = word
    found = generate_responses(model, ordinary_tokenizer(), PROMPTS, Sampling(20, 0.0), 3)
    assert [response.ids for response in found] == unended


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_kernel_without_masks_gives_way_while_generating_and_comes_back(family: str) -> None:
    """To SDPA, or to eager in a model that caps its attention's logits, which SDPA cannot."""
    model = family_model(family)
    expected = [generated_alone(model, prompt, 5) for prompt in PROMPTS]
    model.config._attn_implementation = "flash_attention_2"  # cannot run here: it would fail if it were asked to
    found = generate_responses(model, ordinary_tokenizer(), PROMPTS, Sampling(5, 0.0), 4)
    assert [response.ids for response in found] == expected
    assert model.config._attn_implementation == "flash_attention_2"
