"""Batched generation against one prompt at a time and against the distribution it should sample."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM

from common.alignment import TokenDecoder
from common.errors import InputError
from common.generation.generate import generate_responses
from common.generation.sampling import Sampling
from tests.tiny_models import ordinary_tokenizer, tiny_llama

PROMPTS = [[7, 8, 9, 30, 31], [12], [40, 41], [9, 9, 9, 9, 9, 9, 9, 60], [100, 101, 102]]


def generate(
    prompts=PROMPTS, *, temperature=0.0, seed=0, rows=8, max_new_tokens=12, samples=1, top_p=1.0, model=None,
    pad_is_eos=False,
):
    """`generate_responses` with the settings of these tests."""
    sampling = Sampling(max_new_tokens, temperature, top_p, samples, seed)
    return generate_responses(model or tiny_llama(), ordinary_tokenizer(pad_is_eos), prompts, sampling, rows)


def test_greedy_with_any_number_of_rows_equal_argmax_one_token_at_a_time():
    model = tiny_llama().eval()
    expected = []
    for prompt in PROMPTS:
        ids = list(prompt)
        while len(ids) < len(prompt) + 12 and ids[-1] != 0:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        expected.append(ids[len(prompt) :])
    for rows in (1, 2, 3, 8):
        assert [response.ids for response in generate(rows=rows)] == expected


@pytest.mark.parametrize("rows", [2, 8])
def test_each_response_is_counted_once_when_it_has_ended(rows):
    ended = []
    sampling = Sampling(12, 1.0, 1.0, samples=2, seed=3)
    made = generate_responses(tiny_llama(), ordinary_tokenizer(), PROMPTS, sampling, rows, ended.append)
    assert sum(ended) == len(made) == 10
    assert len(ended) >= 12 and sum(count > 0 for count in ended) > 1  # told after every pass, not at the end
    assert all(count <= rows for count in ended)


def test_the_same_seed_repeats_and_another_differs():
    first = generate(temperature=1.0, seed=3)
    assert first == generate(temperature=1.0, seed=3)
    assert first != generate(temperature=1.0, seed=4)


def test_the_callers_random_state_and_mode_are_left_alone():
    model = tiny_llama().train()
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    generate(temperature=1.0, model=model)
    assert torch.equal(torch.rand(3), expected)
    assert model.training


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_follow_the_models_own_distribution(temperature):
    """No top-k (the library's default is 50) and no top-p: the rare tokens come as often as they should."""
    model = tiny_llama(initializer_range=0.05).eval()
    count = 20_000
    expected = (model(torch.tensor([[12]])).logits[0, -1] / temperature).softmax(-1)
    draws = generate([[12]] * count, temperature=temperature, max_new_tokens=1, rows=count, model=model)
    seen = Counter(response.ids[0] for response in draws)
    frequency = torch.tensor([seen[token] / count for token in range(len(expected))])
    tail = expected.argsort()[:-50]
    # Five standard deviations of a binomial share.
    assert abs(frequency[tail].sum() - expected[tail].sum()) < 5 * (0.25 / count) ** 0.5
    assert ((frequency - expected).abs() < 5 * (expected / count).sqrt() + 5 / count).all()


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_a_response_ends_with_its_first_eos(pad_is_eos):
    model = tiny_llama(initializer_range=0.05)
    responses = generate([[token] for token in range(5, 60)], temperature=2.0, max_new_tokens=120, model=model,
                         pad_is_eos=pad_is_eos, rows=64)  # fmt: skip
    finished = [response for response in responses if response.finished]
    unfinished = [response for response in responses if not response.finished]
    assert finished and unfinished, "the test needs both kinds"
    assert all(response.ids.index(0) == len(response.ids) - 1 for response in finished)
    assert all(len(response.ids) == 120 and 0 not in response.ids for response in unfinished)
    decoder = TokenDecoder(ordinary_tokenizer())
    assert all(response.text == decoder(response.ids).text for response in responses)


def test_what_the_models_folder_recommends_is_ignored_and_kept():
    model = tiny_llama()
    recommended = model.generation_config
    recommended.update(repetition_penalty=5.0, min_new_tokens=12, suppress_tokens=list(range(2, 200)))
    assert generate(model=model) == generate()
    assert model.generation_config is recommended


def test_no_prompts_give_no_responses():
    assert generate([]) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts": [[5], []]}, "empty prompt"),
        ({"temperature": -1.0}, "temperature >= 0"),
        ({"max_new_tokens": 0}, "max_new_tokens >= 1"),
        ({"rows": 0}, "at least 1 row"),
        ({"samples": 0}, "samples >= 1"),
        ({"top_p": 0.0}, "0 < top_p <= 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        generate(**settings)


def ending_llama():
    """A model that ends responses after a dozen tokens or so: a constant of the residual stream speaks for EOS."""
    model = tiny_llama(tie_word_embeddings=False, initializer_range=0.05)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 3.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0.0
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[0] = 0.0
        model.lm_head.weight[0, 0] = 0.63
    return model


@pytest.mark.parametrize("rows", [1, 4, 7, 200])
def test_what_is_drawn_does_not_depend_on_the_rows_that_decode_at_once(rows):
    """Rows end at places of their own, make way and are refilled; every response stays what it is alone."""
    model = ending_llama()
    prompts = [[5 + (7 * place + step) % 90 for step in range(1 + place % 9)] for place in range(20)]
    settings = {"temperature": 1.0, "samples": 3, "max_new_tokens": 40, "model": model}
    found = generate(prompts, rows=rows, **settings)
    lengths = [len(response.ids) for response in found]
    assert len(found) == 60 and min(lengths) < 4 and max(lengths) > 15, "the test needs rows that end apart"
    reference = generate(prompts, rows=60, **settings)
    assert [response.ids for response in found] == [response.ids for response in reference]
    for one, other in zip(found, reference, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=2e-5)  # fp32 in other batch shapes


def test_the_log_probs_are_those_of_a_pass_over_the_whole_sequence():
    model = ending_llama()
    for temperature, scored_at in ((0.7, 0.7), (0.0, 1.0)):
        for place, response in enumerate(generate(temperature=temperature, samples=2, model=model)):
            prompt = PROMPTS[place // 2]
            logits = model.eval()(torch.tensor([prompt + response.ids])).logits[0, len(prompt) - 1 : -1]
            expected = (logits / scored_at).log_softmax(-1).gather(1, torch.tensor(response.ids)[:, None])[:, 0]
            assert response.logprobs == pytest.approx(expected.tolist(), abs=2e-5)  # fp32 in other batch shapes


def test_no_pass_reads_a_prompt_twice_or_a_row_that_has_ended():
    """Tokens that went through the model: every prompt once, every response token but the last once."""
    model = ending_llama()
    seen = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    prompts = [[9, 8, 7, 6, 5]] * 6
    found = generate(prompts, temperature=1.0, samples=4, max_new_tokens=40, rows=24, model=model)
    assert seen[0] == (6, 5)
    decoded = sum(rows for rows, width in seen[1:])
    assert all(width == 1 for _, width in seen[1:])
    assert decoded == sum(len(response.ids) - 1 for response in found)


def test_a_prompt_needs_room_for_all_its_samples_and_gets_it():
    assert generate(samples=5, temperature=1.0, rows=1) == generate(samples=5, temperature=1.0, rows=5)


def test_a_model_without_explicit_positions_is_refused():
    bloom = BloomForCausalLM(BloomConfig(vocab_size=300, hidden_size=32, n_layer=1, n_head=2))
    with pytest.raises(InputError, match="BloomForCausalLM cannot generate here: its forward takes no position_ids"):
        generate(model=bloom)
