"""The systems under evaluation write: from a model folder to one response an example."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from common.data.prompts import PromptBuilder
from common.data.records import Example
from common.errors import InputError
from common.models.generate import generate_responses

Decoding = Literal["sampled", "greedy"]


def load_generator(
    path: str, *, dtype: str = "fp32", attn_implementation: str = "sdpa", trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model, ready to generate on the GPU if there is one, and its tokenizer.

    The sampling settings that the folder recommends are dropped, so that every system is decoded alike.
    Raises `InputError` when the folder holds no such model, or its tokenizer has no EOS or more ids than the model.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(
            path,
            dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[dtype],
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
        )
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"{path}: cannot load a causal language model and its tokenizer ({error})") from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"{path}: the tokenizer has no EOS token, so no response can end; set one in its folder")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    embeddings = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > embeddings:
        raise InputError(
            f"{path}: the tokenizer has {len(tokenizer)} ids but the model embeds only {embeddings}; "
            "they do not belong together"
        )
    # `generate` fills whatever its caller left open from here.
    model.generation_config = GenerationConfig()
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def generate_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    builder: PromptBuilder,
    examples: Sequence[Example],
    *,
    decoding: Decoding,
    temperature: float,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
    progress: str = "",
) -> list[dict[str, Any]]:
    """One row an example, in order: `{"id", "response", "finished", "tokens"}`; `tokens` counts EOS.

    `sampled` draws from the model's own distribution at `temperature`, `greedy` takes the likeliest token. The same
    seed gives the same rows. Raises `InputError` when a prompt and `max_new_tokens` do not fit the model's positions.
    """
    if decoding == "sampled" and temperature <= 0:
        raise InputError(f"temperature must be above 0 for sampled decoding, not {temperature}; see --decoding greedy")
    prompts = [builder.ids(example.history) for example in examples]
    _check_length(model, max(map(len, prompts), default=0), max_new_tokens)
    responses = generate_responses(
        model, tokenizer, prompts, max_new_tokens=max_new_tokens,
        temperature=temperature if decoding == "sampled" else 0.0, seed=seed, batch_size=batch_size, progress=progress,
    )
    return [
        {"id": example.id, "response": response.text, "finished": response.finished, "tokens": len(response.ids)}
        for example, response in zip(examples, responses, strict=True)
    ]


def _check_length(model: PreTrainedModel, prompt_tokens: int, max_new_tokens: int) -> None:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and prompt_tokens + max_new_tokens > positions:
        raise InputError(
            f"the longest prompt has {prompt_tokens} tokens and may be followed by {max_new_tokens}, but the model has "
            f"{positions} positions; lower --max_prompt_tokens or --max_new_tokens"
        )
