"""Responses of a causal language model to prompts: for rollouts, for sampling in step 2 and for evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.alignment import TokenDecoder
from common.errors import InputError
from common.generation.decode import AnyRank, CountEnded, Decoder, check_decodable, uncounted
from common.generation.sampling import Sampling
from common.models.layouts import without_wrapper
from common.models.loading import end_token_ids


class Generated(NamedTuple):
    """One response: its token ids (EOS included when the model wrote it), their text, whether EOS was written, and the
    log-prob of each token when it was drawn."""

    ids: list[int]
    text: str
    finished: bool
    logprobs: list[float]


@torch.no_grad()
def generate_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    rows: int,
    count_ended: CountEnded = uncounted,
    any_rank: AnyRank | None = None,
    graphs: bool = False,
    uniforms: torch.Tensor | None = None,
) -> list[Generated]:
    """`sampling.samples` responses to each prompt (token ids, not padded), prompt by prompt in their order.

    At most `rows` responses are decoded at once. The same prompts and sampling give the same responses, whatever `rows`
    is (to rounding: where two tokens are equally likely, the shape of a batch may decide), and no random state is
    touched. `count_ended` is told after every pass how many responses have just ended. Where weights are sharded every
    rank must make as many passes as the busiest: `any_rank` then says, before each, whether one still works. `graphs`
    records passes on CUDA (`DecodeStep`). `uniforms`, (prompts * samples, max_new_tokens), are the random numbers of
    prompts that are a part of more; the default is `uniform_table`'s. Raises `InputError` for an empty prompt, settings
    out of range or a model that cannot be decoded this way.
    """
    if rows < 1:
        raise InputError(f"generation needs at least 1 row, not {rows}")
    if not all(prompts):
        raise InputError("an empty prompt: give at least one token (a template must not render to nothing)")
    inner = without_wrapper(model)
    check_decodable(inner)
    eos_token_ids = end_token_ids(inner, tokenizer)
    decoder = Decoder(inner, prompts, sampling, eos_token_ids, rows, any_rank, graphs, uniforms)
    with _generating(inner):
        drawn = decoder.run(count_ended)
    text = TokenDecoder(tokenizer)
    return [
        Generated(found.ids, text(found.ids).text, found.ids[-1] in eos_token_ids, found.logprobs)
        for found in drawn
    ]


def _masking_kernel(model: PreTrainedModel) -> str:
    """The fastest kernel that takes any mask and that the architecture has: Gemma 2, which caps its logits, has no
    SDPA."""
    return "sdpa" if model._supports_sdpa else "eager"


@contextmanager
def _generating(model: PreTrainedModel) -> Iterator[None]:
    """Eval mode, and a kernel that takes any mask: flash attention's takes none."""
    was_training, kernel = model.training, model.config._attn_implementation
    model.eval()
    model.config._attn_implementation = kernel if kernel in ("sdpa", "eager") else _masking_kernel(model)
    try:
        yield
    finally:
        model.train(was_training)
        model.config._attn_implementation = kernel
