"""Batched generation against one prompt at a time and against the distribution it should sample."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from common.alignment import TokenDecoder
from common.errors import InputError
from common.models.generate import generate_responses, left_pad
from tests.tiny_models import ordinary_tokenizer, tiny_llama

PROMPTS = [[7, 8, 9, 30, 31], [12], [40, 41], [9, 9, 9, 9, 9, 9, 9, 60], [100, 101, 102]]


def generate(
    prompts=PROMPTS, *, temperature=0.0, seed=0, batch_size=8, max_new_tokens=12, model=None, pad_is_eos=False
):
    """`generate_responses` with the settings of these tests."""
    return generate_responses(
        model or tiny_llama(), ordinary_tokenizer(pad_is_eos), prompts, max_new_tokens, temperature, seed, batch_size
    )


def test_left_pad_by_hand():
    ids, mask = left_pad([[5, 6, 7], [8]], pad_token_id=1)
    assert ids.tolist() == [[5, 6, 7], [1, 1, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_greedy_batches_of_any_size_equal_argmax_one_token_at_a_time():
    model = tiny_llama().eval()
    expected = []
    for prompt in PROMPTS:
        ids = list(prompt)
        while len(ids) < len(prompt) + 12 and ids[-1] != 0:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        expected.append(ids[len(prompt) :])
    for batch_size in (1, 2, 8):
        assert [response.ids for response in generate(batch_size=batch_size)] == expected


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
    draws = generate([[12]] * count, temperature=temperature, max_new_tokens=1, batch_size=count, model=model)
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
                         pad_is_eos=pad_is_eos, batch_size=64)  # fmt: skip
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
        ({"batch_size": 0}, "batch_size >= 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        generate(**settings)
