"""What passes hold and compute, against sums by hand, torch's own allocator, and the formula of useful FLOPs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from benchmarks.flops import Sizes, forward_flops
from common.generation.sampling import Sampling
from common.generation.step import DecodeStep
from common.models.response_scores import ScoringOptions, response_scores
from common.models.sequences import pad_sequences
from common.planning.models import ModelSpec, meta_model, weights_of
from common.planning.passes import Rows, decoding, scoring_pass, update_pass
from common.planning.tracking import PassTracker
from tests.planning.memory import allocated_peak
from tests.tiny_models import tiny_llama

B, H, F = 64, 32, 128
FLOAT = 4
WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "max_position_embeddings": 512}


@pytest.fixture
def llama(tmp_path: Path) -> str:
    return _saved(tmp_path, **WIDE)


def _saved(folder: Path, **sizes: int | str) -> str:
    tiny_llama(**sizes).config.save_pretrained(folder)
    return str(folder / "config.json")


def _meta(*shape: int, **settings: bool) -> torch.Tensor:
    return torch.empty(*shape, device="meta", **settings)


def test_a_linear_layer_costs_two_operations_a_weight_and_row_forward_and_four_backward() -> None:
    weight, rows = _meta(F, H, requires_grad=True), _meta(B, H, requires_grad=True)
    with PassTracker() as tracker:
        functional.linear(rows, weight).sum().backward()
    assert tracker.flops == 6 * B * H * F


def test_what_autograd_keeps_is_held_and_what_nobody_keeps_is_not() -> None:
    rows, weight = _meta(B, H), _meta(H, F, requires_grad=True)
    with PassTracker() as tracker:
        hidden = rows @ weight
        assert tracker.held == B * F * FLOAT
        result = hidden.exp()  # keeps its result, for the gradient
        assert tracker.held == 2 * B * F * FLOAT
        del hidden
        assert tracker.held == B * F * FLOAT
        (result * 2).sum().backward()
        # Both factors' results, the gradients of `result` and of `hidden`, and then the weight's: not all at once.
        del result
    assert tracker.held == H * F * FLOAT == weight.grad.nbytes
    assert tracker.peak <= 4 * B * F * FLOAT


def test_views_and_weights_do_not_count() -> None:
    weight = _meta(H, F)
    with PassTracker() as tracker:
        kept = weight.t()[:5].unsqueeze(0).expand(7, -1, -1)
    assert tracker.peak == 0 and kept.shape == (7, 5, H)


def test_a_mask_selects_as_many_entries_as_it_was_said_to() -> None:
    with PassTracker(selected=11) as tracker:
        picked = _meta(B, H, F)[torch.empty(B, H, dtype=torch.bool, device="meta")]
    assert picked.shape == (11, F)
    assert tracker.flops == 0


def test_fused_attention_never_holds_the_logits_and_the_eager_kernel_does(llama: str) -> None:
    rows, heads, layers = Rows(2, 200, 10), 4, 3
    logits = rows.rows * heads * rows.length**2 * FLOAT
    fused, eager = (update_pass(ModelSpec(llama, "causal_lm", eager=eager), rows) for eager in (False, True))
    assert eager.peak - fused.peak > layers * logits


def test_checkpointing_holds_less_and_computes_more(llama: str) -> None:
    rows = Rows(4, 100, 10)
    plain, checkpointed = (
        update_pass(ModelSpec(llama, "causal_lm", gradient_checkpointing=on), rows) for on in (False, True)
    )
    assert checkpointed.peak < 0.7 * plain.peak
    assert 1.1 < checkpointed.flops / plain.flops < 1.34  # at most one forward pass more, a third of the rest


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_a_training_pass_takes_what_torchs_allocator_gives_it(
    llama: str, gradient_checkpointing: bool, samples: int
) -> None:
    rows = Rows(8, 200, 40, samples)
    spec = ModelSpec(llama, "causal_lm", gradient_checkpointing=gradient_checkpointing)
    model = tiny_llama(**WIDE)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable()
    for parameter in model.train().parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    batch = pad_sequences([[5] * rows.prompt] * 8, [[6] * rows.response] * 8, 1, torch.device("cpu"), samples)
    options = ScoringOptions("shared" if samples > 1 else "padded")

    def train() -> None:
        response_scores(model, model, batch, 1.0, options).logprobs.sum().backward()

    train()
    # Kernels keep a little for themselves, which a pass without storage cannot see: 2 %.
    assert update_pass(spec, rows).peak == pytest.approx(allocated_peak(train), rel=0.02)


def test_flops_of_scoring_are_those_of_the_formula(llama: str) -> None:
    rows = Rows(4, 120, 20)
    config = meta_model(ModelSpec(llama, "causal_lm")).config
    by_formula = rows.rows * forward_flops(Sizes.of(config), 0, rows.length, logits=rows.response)
    # Causal attention: the formula counts the triangle with its diagonal, the kernel half of the square.
    assert scoring_pass(ModelSpec(llama, "causal_lm"), rows).flops == pytest.approx(by_formula, rel=0.01)


def test_the_planned_cache_is_the_actual_one_and_two_heads_sizes_a_token_and_layer(llama: str) -> None:
    prompts, samples, kv_heads, head = Rows(3, 40, 9), 2, 2, 16
    found = decoding(ModelSpec(llama, "causal_lm"), prompts, samples, limit=0)
    model, rows, columns = tiny_llama(**WIDE).eval(), prompts.rows * samples, prompts.length - 1
    step = DecodeStep(model, Sampling(9, 1.0, samples=samples), torch.rand(rows, 9), rows, columns)
    with torch.no_grad():
        step.read([[5] * prompts.prompt] * prompts.rows, samples, 0, list(range(rows)))
    actual = sum(layer.keys.nbytes + layer.values.nbytes for layer in step._cache.layers)
    assert found.cache == actual == 2 * WIDE["num_hidden_layers"] * kv_heads * head * columns * rows * FLOAT
    assert (found.blocks, found.draws) == (1, prompts.response)


def test_fewer_rows_at_once_are_less_cache_and_more_passes(llama: str) -> None:
    spec, prompts = ModelSpec(llama, "causal_lm"), Rows(8, 40, 9)
    every, half = (decoding(spec, prompts, 1, limit) for limit in (0, 4))
    assert half.cache == every.cache // 2 and half.draws == 2 * every.draws


def test_adapters_are_as_many_as_peft_says_and_all_that_is_trained(llama: str) -> None:
    spec = ModelSpec(llama, "causal_lm", lora_r=4)
    trained, every = meta_model(spec).get_nb_trainable_parameters()
    found = weights_of(spec, trained=True)
    assert (sum(found.trained), found.total) == (trained, every)
    linear = [m for m in meta_model(ModelSpec(llama, "causal_lm")).model.modules() if isinstance(m, nn.Linear)]
    assert trained == sum(4 * (layer.in_features + layer.out_features) for layer in linear)
    assert found.adapted == sum(layer.weight.numel() for layer in linear)


def test_tied_embeddings_count_once(llama: str) -> None:
    assert weights_of(ModelSpec(llama, "causal_lm"), trained=True).total == tiny_llama(**WIDE).num_parameters()
    assert json.loads(Path(llama).read_text())["tie_word_embeddings"]
