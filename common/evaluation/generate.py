"""The systems under evaluation write: from a model folder to one response an example."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.config import ModelOptions
from common.data.prompts import PromptBuilder
from common.data.records import Example
from common.errors import InputError
from common.generation.generate import generate_responses
from common.generation.sampling import Sampling
from common.models.loading import check_vocabulary, load_causal_lm, load_tokenizer
from common.progress import progress as progress_bar

Decoding = Literal["sampled", "greedy"]


def load_generator(path: str, options: ModelOptions) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The causal language model under `path`, on the GPU if there is one, and its tokenizer.

    Raises `InputError` when there is no such model, its tokenizer cannot end a response or be traced to text, or the
    two do not belong together.
    """
    # Padding is masked and never read, so that a folder without a pad token can be compared too.
    tokenizer = load_tokenizer(path, options.trust_remote_code, pad_token="eos")
    model = load_causal_lm(path, options)
    check_vocabulary(model, tokenizer)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


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
    samples: int = 1,
    progress: str = "",
) -> list[dict[str, Any]]:
    """`samples` rows an example, in order: `{"id", "response", "finished", "tokens"}`; `tokens` counts EOS.

    `sampled` draws from the model's own distribution at `temperature`, `greedy` takes the likeliest token. The same
    seed gives the same rows, whatever `batch_size` is (except for rounding, see `generate_responses`). `progress` is
    the label of a progress bar; without it there is none. Raises `InputError` when a prompt and `max_new_tokens` do not
    fit the model's positions.
    """
    if decoding == "sampled" and temperature <= 0:
        raise InputError(f"temperature must be above 0 for sampled decoding, not {temperature}; see --decoding greedy")
    prompts = [builder.ids(example.history) for example in examples]
    _check_length(model, max(map(len, prompts), default=0), max_new_tokens)
    sampling = Sampling(max_new_tokens, temperature if decoding == "sampled" else 0.0, samples=samples, seed=seed)
    with progress_bar(total=len(prompts) * samples, desc=progress, unit="response") as bar:
        responses = generate_responses(model, tokenizer, prompts, sampling, batch_size, bar.update)
    return [
        {"id": example.id, "response": response.text, "finished": response.finished, "tokens": len(response.ids)}
        for example, response in zip(repeated(examples, samples), responses, strict=True)
    ]


def repeated(examples: Sequence[Example], samples: int) -> list[Example]:
    """Each example as often as it has responses."""
    return [example for example in examples for _ in range(samples)]


def _check_length(model: PreTrainedModel, prompt_tokens: int, max_new_tokens: int) -> None:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and prompt_tokens + max_new_tokens > positions:
        raise InputError(
            f"the longest prompt has {prompt_tokens} tokens and may be followed by {max_new_tokens}, but the model has "
            f"{positions} positions; lower --max_prompt_tokens or --max_new_tokens"
        )
