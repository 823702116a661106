"""Scores in pieces of the vocabulary against whole logits: values, gradients, and through models."""

from __future__ import annotations

import pytest
import torch

from common.models.layouts import LAYOUTS, Layout
from common.models.response_scores import ScoringOptions, response_scores
from common.models.sequences import pad_sequences
from common.models.token_scores import token_scores_from_hidden, token_scores_from_logits
from common.models.value_model import ValueModel
from tests.tiny_models import tiny_llama

# fp32 sums of at most 300 terms in another order, of numbers up to 30.
TOLERANCE = {"rtol": 0, "atol": 3e-5}


@pytest.mark.parametrize("piece", [1, 7, 23, 100])
@pytest.mark.parametrize("biased", [False, True])
def test_values_and_gradients_equal_those_of_whole_logits(piece: int, biased: bool) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(9, 5, requires_grad=True), torch.randn(23, 5, requires_grad=True)
    bias = torch.randn(23, requires_grad=True) if biased else None
    leaves = [leaf for leaf in (hidden, weight, bias) if leaf is not None]
    ids, along = torch.randint(0, 23, (9,)), torch.randn(2, 9)
    whole = token_scores_from_logits(torch.nn.functional.linear(hidden, weight, bias), ids, 0.7, True)
    pieces = token_scores_from_hidden(hidden, weight, bias, ids, 0.7, piece)
    for one, other in zip(whole, pieces, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)
    for one, other in zip(
        *(torch.autograd.grad((torch.stack(found) * along).sum(), leaves) for found in (whole, pieces)), strict=True
    ):
        torch.testing.assert_close(one, other, **TOLERANCE)


def test_a_frozen_head_gets_no_gradient_and_the_hidden_states_theirs() -> None:
    hidden, weight = torch.randn(4, 5, requires_grad=True), torch.randn(11, 5)
    logprobs, _ = token_scores_from_hidden(hidden, weight, None, torch.arange(4), 1.0, 3)
    logprobs.sum().backward()
    assert weight.grad is None and float(hidden.grad.abs().max()) > 0


def ragged_batch():
    prompts = [[11, 12, 13], [14], [15, 16, 17, 18, 19, 20, 21], [22, 23]]
    responses = [[3, 4], [5, 3, 2, 9, 9], [6], [7, 8, 9, 10]]
    return pad_sequences(prompts, responses, 0, torch.device("cpu"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("chunks", [False, True])
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_every_layout_gives_the_same_scores_and_gradients(layout: Layout, chunks: bool, kernel: str) -> None:
    batch = ragged_batch()
    along = torch.randn(batch.response_mask.shape, generator=torch.Generator().manual_seed(3))
    found = []
    for each in (ScoringOptions(), ScoringOptions(layout, chunks)):
        model = tiny_llama(tie_word_embeddings=False, attn_implementation=kernel)
        scores = response_scores(model, model, batch, 0.7, each, entropy_gradient=True)
        (scores.logprobs * along + scores.entropy * along.square()).sum().backward()
        found.append((scores, {name: parameter.grad for name, parameter in model.named_parameters()}))
    (plain, plain_gradients), (other, gradients) = found
    torch.testing.assert_close(plain.logprobs, other.logprobs, **TOLERANCE)
    torch.testing.assert_close(plain.entropy, other.entropy, **TOLERANCE)
    for name, gradient in plain_gradients.items():
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-3, atol=1e-3)


def test_a_packed_critic_gives_the_same_values() -> None:
    batch = ragged_batch()
    padded, packed = ValueModel(tiny_llama().model).eval(), ValueModel(tiny_llama().model, "packed").eval()
    packed.load_state_dict(padded.state_dict())
    torch.testing.assert_close(padded(batch), packed(batch), **TOLERANCE)


def test_logits_are_made_for_response_tokens_alone() -> None:
    model, batch, seen = tiny_llama(), ragged_batch(), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    response_scores(model, model, batch, 1.0)
    assert seen == [(2 + 5 + 1 + 4, 300)]


@pytest.mark.parametrize("budget", [1, 8, 11, 16, 100])
@pytest.mark.parametrize("blocks", [1, 3, 4])
def test_blocks_by_tokens_hold_every_row_once_within_the_budget(budget: int, blocks: int) -> None:
    batch = ragged_batch()
    lengths = batch.attention_mask.sum(1)  # 5, 6, 8, 6
    found = batch.by_tokens(torch.arange(4), budget, blocks)
    assert sorted(torch.cat(found).tolist()) == [0, 1, 2, 3]
    assert len(found) >= blocks and all(len(block) for block in found)
    for block in found:
        assert len(block) == 1 or len(block) * int(lengths[block].max()) <= budget
    if blocks == 1:
        by_hand = {1: 4, 8: 4, 11: 4, 16: 2, 100: 1}  # 8 | 6 | 6 | 5, or 8 + 6 | 6 + 5 rows two by two
        assert len(found) == by_hand[budget]
