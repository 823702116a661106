"""A prompt that is read once for all its responses: rows and masks by hand, and the same numbers as padded rows."""

from __future__ import annotations

from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.config import LoraOptions
from common.models.layouts import Layout, accepts, lay_out, visible, why_not_shared
from common.models.loading import apply_lora
from common.models.response_scores import ScoringOptions, TokenScores, response_scores
from common.models.sequences import SequenceBatch, pad_sequences, score_in_blocks
from common.models.value_model import ValueModel
from tests.families import ACTORS, WINDOW, family_config, family_model
from tests.tiny_models import tiny_llama

CPU = torch.device("cpu")
# Prompts shorter and longer than a window, responses of different lengths.
PROMPTS = [[11, 12, 13, 14, 15, 16, 17, 18, 19], [30], [41, 42, 43]]
RESPONSES = [
    [[3, 4], [5, 3, 2, 9, 9], [6]],
    [[7, 8, 9, 10, 11, 12, 13, 14, 15], [7], [9, 9]],
    [[20, 21, 22], [20, 21, 22], [23]],
]


def batch_of(samples: int = 3) -> SequenceBatch:
    prompts = [prompt for prompt in PROMPTS for _ in range(samples)]
    responses = [response for responses in RESPONSES for response in responses[:samples]]
    return pad_sequences(prompts, responses, 0, CPU, samples)


def test_a_row_by_hand() -> None:
    batch = pad_sequences([[11, 12], [11, 12], [14]], [[3, 4], [5], [6, 7, 8]], 1, CPU)
    rows = lay_out(batch._replace(prompt_index=torch.tensor([0, 0, 1])), "shared")
    assert rows.input_ids.tolist() == [[11, 12, 3, 4, 5], [14, 6, 7, 8, 0]]
    assert rows.position_ids.tolist() == [[0, 1, 2, 3, 2], [0, 1, 2, 3, 0]]
    assert rows.segments.tolist() == [[0, 0, 1, 1, 2], [0, 1, 1, 1, -1]]
    assert rows.keep.int().tolist() == [[0, 1, 1, 0, 0], [1, 1, 1, 0, 0]]
    # 3 and 5 are both predicted at the prompt's end, 4 by 3, and 6, 7, 8 one after the other.
    assert rows.index.tolist() == [0, 1, 0, 2, 3, 4]
    assert rows.response_ids.tolist() == [3, 4, 5, 6, 7, 8]


def test_rows_of_a_prompt_need_not_stand_together() -> None:
    batch = pad_sequences([[11, 12], [14], [11, 12]], [[3, 4], [6], [5]], 1, CPU)
    rows = lay_out(batch._replace(prompt_index=torch.tensor([7, 2, 7])), "shared")
    assert rows.input_ids.tolist() == [[14, 6, 0, 0, 0], [11, 12, 3, 4, 5]]
    assert rows.index.tolist() == [1, 2, 0, 1]  # in the order of the batch: 3, 4, 6, 5


@pytest.mark.parametrize("window", [None, 1, 3])
def test_a_mask_against_a_loop(window: int | None) -> None:
    rows = lay_out(batch_of(), "shared")
    found = visible(rows.segments, rows.position_ids, window)
    for row, (segments, positions) in enumerate(zip(rows.segments.tolist(), rows.position_ids.tolist(), strict=True)):
        for i, own in enumerate(segments):
            for j, other in enumerate(segments):
                seen = j <= i and other in (0, own) and (window is None or positions[i] - positions[j] < window)
                assert bool(found[row, 0, i, j]) == seen, (row, i, j)


def scores_and_gradients(
    model: torch.nn.Module, batch: SequenceBatch, options: ScoringOptions
) -> tuple[TokenScores, torch.Tensor]:
    model.zero_grad()
    scores = response_scores(model, model, batch, 0.7, options, entropy_gradient=True)
    along = torch.randn(scores.logprobs.shape, generator=torch.Generator().manual_seed(3))
    (scores.logprobs * along + 0.3 * scores.entropy * along.square()).sum().backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return scores, torch.cat(gradients)


def assert_same(found: tuple[TokenScores, torch.Tensor], expected: tuple[TokenScores, torch.Tensor]) -> None:
    """fp32: log-probs to 1e-5, times the size of the tiny models' logits; gradients to 1e-5 of the largest."""
    (scores, gradient), (plain, plain_gradient) = found, expected
    for one, other in zip(scores, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(gradient, plain_gradient, rtol=0, atol=1e-5 * float(plain_gradient.abs().max()))


@pytest.mark.parametrize("name", ACTORS)
def test_every_family_gives_the_same_scores_and_gradients(name: str) -> None:
    """Families with a window have one that is shorter than a row, and than the longest prompt."""
    model, batch = family_model(name), batch_of()
    expected = scores_and_gradients(model, batch, ScoringOptions("padded"))
    assert_same(scores_and_gradients(model, batch, ScoringOptions("shared")), expected)
    assert reason_of(model) == ""


def reason_of(model: torch.nn.Module) -> str:
    def read(batch: SequenceBatch, layout: Layout) -> None:
        response_scores(model, model, batch, 1.0, ScoringOptions(layout))

    return why_not_shared(model, read)


@pytest.mark.parametrize("name", ACTORS)
def test_every_family_gives_the_same_values(name: str) -> None:
    batch, model = batch_of(), ValueModel(family_model(name).base_model).eval()
    padded = model(batch)
    model.layout = "shared"
    torch.testing.assert_close(model(batch), padded, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["mistral", "qwen2, some layers with a window", "gemma3_text"])
def test_a_window_counts_positions_under_every_kernel(name: str, kernel: str) -> None:
    assert family_config(ACTORS[name]).sliding_window == WINDOW < len(PROMPTS[0])
    model, batch = family_model(name), batch_of()
    model.set_attn_implementation(kernel)
    expected = scores_and_gradients(model, batch, ScoringOptions("padded"))
    assert_same(scores_and_gradients(model, batch, ScoringOptions("shared")), expected)


def test_flex_attention_gives_the_same_scores() -> None:
    """Without gradients, which FlexAttention has on CUDA alone."""
    batch = batch_of()
    for name in ("llama", "gemma3_text"):
        model = family_model(name)
        with torch.no_grad():
            padded = response_scores(model, model, batch, 1.0)
            model.set_attn_implementation("flex_attention")
            shared = response_scores(model, model, batch, 1.0, ScoringOptions("shared"))
        torch.testing.assert_close(shared.logprobs, padded.logprobs, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("chunks", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora_r", [0, 4])
def test_adapters_checkpointing_and_chunks_change_nothing(chunks: bool, checkpointing: bool, lora_r: int) -> None:
    model, batch = tiny_llama(), batch_of()
    if lora_r:
        model = apply_lora(model, LoraOptions(lora_r=lora_r))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)  # adapters that do something
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
        model.train()
    expected = scores_and_gradients(model, batch, ScoringOptions("padded"))
    assert_same(scores_and_gradients(model, batch, ScoringOptions("shared", chunks)), expected)


def test_bf16_differs_no_more_than_packed_rows_do() -> None:
    model, batch = family_model("llama").to(torch.bfloat16), batch_of()
    exact = family_model("llama")
    with torch.no_grad():
        expected = response_scores(exact, exact, batch, 1.0).logprobs
        errors = {
            layout: response_scores(model, model, batch, 1.0, ScoringOptions(layout)).logprobs - expected
            for layout in ("padded", "shared")
        }
    padded, shared = (float(error.square().mean().sqrt()) for error in errors.values())
    assert 0 < shared < 1.3 * padded, (shared, padded)


@pytest.mark.parametrize("samples", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 9])
def test_blocks_of_any_size_give_the_same_scores(samples: int, size: int) -> None:
    """Sizes that groups fit into and sizes that cut them."""
    model, batch = tiny_llama().eval(), batch_of(samples)
    everything = torch.arange(3 * samples)

    def forward(block: SequenceBatch) -> TokenScores:
        return response_scores(model, model, block, 1.0, ScoringOptions("shared"))

    with torch.no_grad():
        expected = response_scores(model, model, batch, 1.0)
        for blocks in (batch.by_length(everything, size), batch.by_tokens(everything, 4 * size)):
            assert torch.cat(blocks).sort().values.tolist() == everything.tolist()
            for found, plain in zip(score_in_blocks(batch, blocks, forward), expected, strict=True):
                torch.testing.assert_close(found, plain, rtol=1e-5, atol=2e-5)


def test_the_models_that_cannot_share_say_why() -> None:
    model = family_model("llama")
    model.config._attn_implementation = "flash_attention_2"
    assert "takes no mask" in reason_of(model)
    model = family_model("llama")
    model.config.layer_types = ["full_attention", "chunked_attention"]
    assert "chunked_attention" in reason_of(model)
    model = family_model("llama")
    forward = model.model.forward

    def without_mask(input_ids=None, position_ids=None, attention_mask=None, **others):
        return forward(input_ids=input_ids, position_ids=position_ids, **others)

    model.model.forward = without_mask
    assert "does not follow a mask" in reason_of(model)

    def without_positions(input_ids=None, position_ids=None, attention_mask=None, **others):
        return forward(input_ids=input_ids, attention_mask=attention_mask, **others)

    model.model.forward = without_positions
    assert "does not follow a mask" in reason_of(model)
    model.model.forward = lambda input_ids=None, attention_mask=None, **others: None
    assert "position_ids" not in model.model.forward.__code__.co_varnames and not accepts(model.model, "position_ids")
    assert "takes no positions" in reason_of(model)


GROUPS = st.lists(
    st.tuples(st.integers(1, 12), st.lists(st.integers(1, 6), min_size=1, max_size=5)), min_size=1, max_size=6
)


def grouped(groups: list[tuple[int, list[int]]]) -> SequenceBatch:
    rows = [(prompt, length) for prompt, lengths in groups for length in lengths]
    batch = pad_sequences([[5] * prompt for prompt, _ in rows], [[6] * length for _, length in rows], 0, CPU)
    index = [number for number, (_, lengths) in enumerate(groups) for _ in lengths]
    return batch._replace(prompt_index=torch.tensor(index))


@given(GROUPS, st.integers(1, 60), st.integers(1, 8))
def test_blocks_by_tokens_hold_what_they_may(groups: list[tuple[int, list[int]]], budget: int, least: int) -> None:
    batch = grouped(groups)
    rows = len(batch.input_ids)
    blocks = batch.by_tokens(torch.arange(rows), budget, least)
    assert torch.cat(blocks).sort().values.tolist() == list(range(rows)) and all(len(block) for block in blocks)
    assert len(blocks) >= min(least, rows)
    for block in blocks:
        laid_out = lay_out(batch.rows(block), "shared").input_ids
        assert len(block) == 1 or laid_out.numel() <= budget


@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 9), st.randoms(use_true_random=False))
def test_the_number_of_blocks_by_length_does_not_depend_on_lengths(
    prompts: int, samples: int, size: int, random: Random
) -> None:
    def blocks() -> list[torch.Tensor]:
        groups = [(random.randint(1, 9), [random.randint(1, 5) for _ in range(samples)]) for _ in range(prompts)]
        batch = grouped(groups)
        return batch.by_length(torch.arange(prompts * samples), size)

    first, second = blocks(), blocks()
    assert [len(block) for block in first] == [len(block) for block in second]
    assert max(len(block) for block in first) <= size
    if size >= samples:  # no prompt is read twice
        assert all(len(set((block // samples).tolist())) * samples == len(block) for block in first)
