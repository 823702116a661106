"""Responses of a causal language model to prompts, for sampling in step 2 and for evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from peft import PeftModel
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from common.alignment import TokenDecoder
from common.errors import InputError


class Generated(NamedTuple):
    """One response: its token ids (EOS included when the model wrote it), their text, and whether EOS was written."""

    ids: list[int]
    text: str
    finished: bool


@torch.no_grad()
def generate_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    seed: int,
    batch_size: int,
    progress: str = "",
    synced: bool = False,
) -> list[Generated]:
    """One response a prompt (token ids, not padded), in the order of `prompts`.

    The model's own distribution is sampled at `temperature` (no top-p, no top-k, nothing that its folder recommends); 0
    is greedy decoding. Prompts of similar length share a batch, padded on the left. The same prompts, seed and batch
    size give the same responses, and the caller's random state is left as it was. `progress` labels a progress bar;
    without it there is none. `synced` makes every rank go on until the last has finished, which sharded weights need.
    Raises `InputError` for an empty prompt or settings out of range.
    """
    if temperature < 0 or max_new_tokens < 1 or batch_size < 1:
        raise InputError(
            "generation needs temperature >= 0, max_new_tokens >= 1 and batch_size >= 1, "
            f"not {temperature}, {max_new_tokens} and {batch_size}"
        )
    if not all(prompts):
        raise InputError("an empty prompt: give at least one token (a template must not render to nothing)")
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        use_cache=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **({"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0} if temperature > 0 else {}),
    )
    # LoRA lives inside the base model's layers; the wrapper's own `generate` would overwrite the settings for good.
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    decoder = TokenDecoder(tokenizer)
    responses: list[Generated | None] = [None] * len(prompts)
    cuda = [inner.device] if inner.device.type == "cuda" else []
    with _generating(inner, config), torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        for rows in tqdm(list(_batches(prompts, batch_size)), desc=progress, disable=not progress):
            input_ids, attention_mask = left_pad([prompts[row] for row in rows], tokenizer.pad_token_id)
            output = inner.generate(
                input_ids=input_ids.to(inner.device),
                attention_mask=attention_mask.to(inner.device),
                generation_config=config,
                synced_gpus=synced,
            )
            for row, ids in zip(rows, output[:, input_ids.shape[1] :].tolist(), strict=True):
                responses[row] = _response(ids, tokenizer.eos_token_id, decoder)
    return responses


@contextmanager
def _generating(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Eval mode, and `config` alone: transformers fills what a call leaves open from the model's own settings, so
    that a repetition penalty in the model's folder would change the distribution that log-probs are taken of.
    """
    was_training, own_config = model.training, model.generation_config
    model.eval()
    model.generation_config = config
    try:
        yield
    finally:
        model.train(was_training)
        model.generation_config = own_config


def left_pad(prompts: Sequence[Sequence[int]], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts padded on the left: ids and attention mask (0 on padding), both `(B, T)` with T the longest prompt."""
    width = max(map(len, prompts))
    ids = [[pad_token_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids), torch.tensor(mask)


def _batches(prompts: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    """Row numbers, longest prompts first: a batch that does not fit in memory fails at once."""
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _response(ids: list[int], eos_token_id: int, decoder: TokenDecoder) -> Generated:
    """Cut what follows the first EOS: other rows of the batch went on for longer."""
    finished = eos_token_id in ids
    kept = ids[: ids.index(eos_token_id) + 1] if finished else ids
    return Generated(kept, decoder(kept).text, finished)
