"""The passes of a run, of the models on the device "meta": what each holds at its highest, and how much it computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from torch import Tensor, nn

from common.engine.memory import cache_bytes
from common.generation.decode import PROMPT_TOKENS
from common.generation.sampling import Sampling
from common.generation.step import DecodeStep
from common.models.layouts import ModelRows, accepts, lay_out, without_wrapper
from common.models.response_scores import scores_of_rows
from common.models.reward_encoder import prefix_mask, takes_segments
from common.models.sequences import pad_sequences
from common.models.token_reward import logits_of_rows
from common.planning.models import ModelSpec, gives_own_logits, meta_model
from common.planning.tracking import PassTracker


class Pass(NamedTuple):
    """`peak` bytes beside weights, gradients and cache; floating-point operations."""

    peak: int
    flops: float


class Decoding(NamedTuple):
    """Of drawing responses: `cache` bytes of keys and values; reading a block of prompts, and drawing a token of each
    row; how many `blocks` and `draws` a rollout has."""

    cache: int
    read: Pass
    draw: Pass
    blocks: int
    draws: int


class Rows(NamedTuple):
    """Sequences of one length: a prompt's tokens and a response's; `samples` responses to a prompt are read with it in
    one row."""

    rows: int
    prompt: int
    response: int
    samples: int = 1

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self.prompt + self.response


@lru_cache(maxsize=256)
def scoring_pass(spec: ModelSpec, rows: Rows) -> Pass:
    """A pass without gradients that gives each response token's log-prob, or value."""
    model, laid_out = meta_model(spec).eval(), _laid_out(rows)
    score = _score(spec, laid_out.to("meta"))
    with torch.no_grad(), _linear_of(spec), PassTracker(int(laid_out.keep.sum())) as tracker:
        score(model)
    return Pass(tracker.peak, tracker.flops)


@lru_cache(maxsize=256)
def update_pass(spec: ModelSpec, rows: Rows) -> Pass:
    """A forward and a backward pass of PPO."""
    laid_out = _laid_out(rows)
    score = _score(spec, laid_out.to("meta"))
    return training_pass(spec, lambda model: score(model).sum(), int(laid_out.keep.sum()))


def training_pass(
    spec: ModelSpec, loss: Callable[[nn.Module], Tensor], selected: int = 0, padded: bool = False
) -> Pass:
    """Forward and backward pass of `loss`; a gradient is let go of once it is whole, as DeepSpeed copies it into its
    buckets. `selected` and `padded` as in `PassTracker`."""
    model = meta_model(spec).train()
    hooks = [p.register_post_accumulate_grad_hook(_let_go) for p in model.parameters() if p.requires_grad]
    try:
        with _linear_of(spec), PassTracker(selected, padded) as tracker:
            loss(model).backward()
    finally:
        for hook in hooks:
            hook.remove()
    return Pass(tracker.peak, tracker.flops)


@lru_cache(maxsize=256)
def classifier_pass(spec: ModelSpec, rows: Rows, prefix_attention: bool = False) -> Pass:
    """A reward model's pass without gradients. Rows of one sample have padding; others hold a history once."""
    if rows.samples == 1:
        return evaluation_pass(
            spec, lambda model: model(**classifier_inputs(model, rows, prefix_attention)).logits.float()
        )
    laid_out = _laid_out(rows, at_tokens=True)
    on_meta = laid_out.to("meta")
    selected = int(laid_out.keep.sum())
    return evaluation_pass(spec, lambda model: logits_of_rows(model, on_meta, prefix_attention), selected)


def evaluation_pass(spec: ModelSpec, evaluate: Callable[[nn.Module], Any], selected: int = 0) -> Pass:
    """A pass of `evaluate` without gradients over a batch with padding; `selected` as in `PassTracker`."""
    model = meta_model(spec).eval()
    with torch.no_grad(), _linear_of(spec), PassTracker(selected, padded=True) as tracker:
        evaluate(model)
    return Pass(tracker.peak, tracker.flops)


def classifier_inputs(model: nn.Module, rows: Rows, prefix_attention: bool) -> dict[str, Tensor]:
    """What `RewardEncoder.collate` gives a model for `rows` with padding."""
    names = ["input_ids", "attention_mask"]
    if takes_segments(model):
        names.append("token_type_ids")
    if accepts(model, "global_attention_mask"):
        names.append("global_attention_mask")
    inputs = {name: torch.zeros(rows.rows, rows.length, dtype=torch.long, device="meta") for name in names}
    if prefix_attention:
        segments = inputs["attention_mask"]
        inputs["attention_mask"] = prefix_mask(segments, model.config._attn_implementation, model.dtype)
    return inputs


@lru_cache(maxsize=256)
def decoding(spec: ModelSpec, prompts: Rows, samples: int, limit: int) -> Decoding:
    """Drawing `samples` responses to each of `prompts`, at most `limit` rows at once (0: all), as `Decoder` does."""
    model = without_wrapper(meta_model(spec)).eval()
    responses = prompts.rows * samples
    rows = min(max(limit or responses, samples), responses)
    count = min(prompts.rows, rows // samples, max(1, PROMPT_TOKENS // prompts.prompt))
    sampling = Sampling(prompts.response, 1.0, samples=samples)
    columns = prompts.length - 1
    cache = cache_bytes(model.config.get_text_config(), rows, columns, model.dtype)
    # A merged model is decoded: no adapters' passes. ZeRO-3's linear layer is off.
    with torch.no_grad(), _adapters_off(spec), PassTracker() as tracker:
        uniforms = torch.zeros(responses, prompts.response, device="meta")
        step = DecodeStep(model, sampling, uniforms, rows, columns)
        step.read([[0] * prompts.prompt] * count, samples, 0, list(range(count * samples)))
        read = Pass(tracker.peak - cache, tracker.flops)
        tracker.peak, tracker.flops = tracker.held, 0.0
        step.draw(rows, columns)
        draw = Pass(tracker.peak - cache, tracker.flops)
    waves = -(-responses // rows)
    return Decoding(cache, read, draw, -(-prompts.rows // count), waves * prompts.response)


def _laid_out(rows: Rows, at_tokens: bool = False) -> ModelRows:
    """A batch of `rows` without padding, as a model reads it. It has storage, so that its masks can be counted.

    `at_tokens` as in `lay_out`.
    """
    prompts, responses = [[0] * rows.prompt] * rows.rows, [[0] * rows.response] * rows.rows
    batch = pad_sequences(prompts, responses, 0, torch.device("cpu"), rows.samples)
    return lay_out(batch, "shared" if rows.samples > 1 else "padded", at_tokens)


def _score(spec: ModelSpec, rows: ModelRows) -> Callable[[nn.Module], Tensor]:
    if spec.kind == "value_model":
        return lambda model: model.values_of_rows(rows)
    chunks = gives_own_logits(spec)
    return lambda model: scores_of_rows(model, model, rows, 1.0, chunks).logprobs


def _let_go(parameter: nn.Parameter) -> None:
    parameter.grad = None


@contextmanager
def _linear_of(spec: ModelSpec) -> Iterator[None]:
    """ZeRO-3's linear layer in the place of torch's, if the model is to run under it."""
    plain = torch.nn.functional.linear
    if spec.zero3:
        torch.nn.functional.linear = zero3_linear_wrap
    try:
        yield
    finally:
        torch.nn.functional.linear = plain


@contextmanager
def _adapters_off(spec: ModelSpec) -> Iterator[None]:
    if not spec.lora_r:
        yield
        return
    with meta_model(spec).disable_adapter():
        yield
