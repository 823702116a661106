"""The draw against the distribution it is drawn from."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from common.generation.sampling import Sampling, draw_tokens, uniform_table

DRAWS = 20_000
LOGITS = torch.tensor([2.0, -1.0, 0.5, 1.5, -3.0, 0.0, 1.0, -0.5])


def nucleus(temperature: float, top_p: float) -> torch.Tensor:
    """The distribution by definition: the likeliest tokens until their mass reaches top_p, the rest cut off."""
    shares = (LOGITS.double() / temperature).softmax(-1)
    kept, mass = torch.zeros_like(shares), 0.0
    for token in shares.argsort(descending=True).tolist():
        if mass >= top_p:
            break
        kept[token] = shares[token]
        mass += float(shares[token])
    return kept / kept.sum()


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 0.8), (0.7, 0.95)])
def test_frequencies_pass_a_chi_square_test(temperature: float, top_p: float) -> None:
    uniforms = torch.rand(DRAWS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tokens, logprobs = draw_tokens(LOGITS.expand(DRAWS, -1), uniforms, temperature, top_p)
    expected = nucleus(temperature, top_p)
    counts = torch.bincount(tokens, minlength=len(LOGITS)).double()
    assert counts[expected == 0].sum() == 0
    inside = expected > 0
    # The seed is fixed; a wrong distribution of this size gives p-values below 1e-20.
    assert chisquare(counts[inside], expected[inside] * DRAWS).pvalue > 1e-3
    whole = (LOGITS / temperature).log_softmax(-1)
    torch.testing.assert_close(logprobs, whole[tokens])


def test_greedy_takes_the_likeliest_whatever_the_random_number() -> None:
    tokens, logprobs = draw_tokens(LOGITS.expand(3, -1), torch.tensor([0.0, 0.5, 0.999]), 0.0, 1.0)
    assert tokens.tolist() == [0, 0, 0]
    assert logprobs.tolist() == pytest.approx([float(LOGITS.log_softmax(-1)[0])] * 3)


@given(st.floats(0, 1, exclude_max=True), st.lists(st.floats(-5, 5), min_size=2, max_size=9), st.floats(0.05, 1))
def test_a_token_of_probability_0_is_never_drawn(uniform: float, values: list[float], top_p: float) -> None:
    logits = torch.tensor([[*values, -torch.inf]])
    tokens, logprobs = draw_tokens(logits, torch.tensor([uniform], dtype=torch.float64), 1.0, top_p)
    assert int(tokens) < len(values) and bool(logprobs.isfinite().all())


def test_rare_tokens_of_a_large_vocabulary_come_as_often_as_they_should() -> None:
    """A running sum in single precision loses tokens of probability 1e-8 among 100,000."""
    logits = torch.full((1, 100_000), -18.0)
    logits[0, 0] = 0.0
    share = float((logits.double().softmax(-1))[0, 1:].sum())
    just_inside = torch.tensor([1 - share / 2], dtype=torch.float64)
    token, _ = draw_tokens(logits, just_inside, 1.0, 1.0)
    # Half of the rare tokens' mass lies before it. fp32 shares are right to 1e-7 each, far less than one token's place.
    assert abs(int(token) - 50_000) < 10


def test_random_numbers_belong_to_a_response_and_not_to_its_batch() -> None:
    few, many = (uniform_table(Sampling(4, samples=2, seed=7), prompts) for prompts in (3, 30))
    assert few.shape == (6, 4)
    assert torch.equal(many[:6], few)
    generator = torch.Generator().manual_seed(7)
    parts = [uniform_table(Sampling(4, samples=2, seed=7), prompts, generator) for prompts in (3, 1, 26)]
    assert torch.equal(torch.cat(parts), many)
