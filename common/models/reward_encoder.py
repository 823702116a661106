"""From a history and a response to what a token-level reward model reads, and which of its tokens are which words."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.alignment import Span
from common.data.prompts import PromptBuilder
from common.data.records import Event
from common.errors import InputError
from common.models.layouts import PADDING, accepts, kernel_mask, visible
from common.models.loading import check_vocabulary
from common.models.reward_options import RewardInputOptions
from common.text import Word, split_words

_NO_SPAN: Span = (0.0, 0.0)


class TokenSequence(NamedTuple):
    """What the model reads of one response: ids, segment ids and whether a token is the response's, each (T,)."""

    input_ids: np.ndarray
    token_types: np.ndarray
    in_response: np.ndarray


class EncodedResponse(NamedTuple):
    """Tokens with their spans in the response, empty for all other tokens (T); the response's words.

    `dropped_tokens` were cut off the response's end to fit the length limit; words there have no token.
    """

    tokens: TokenSequence
    spans: list[Span]
    words: list[Word]
    dropped_tokens: int


class RewardEncoder:
    """Encodes (history, response) pairs for `model` and pads them into batches.

    History and response are the two segments of the tokenizer's own pair format; where it has no separator they are
    just joined, and so the history always ends with a line break. Inputs that only some models have are given by
    capability: segment ids where the model has more than one, global attention on the response where its forward takes
    it (Longformer).

    Raises `InputError` for a tokenizer without offsets or padding, one that has more tokens than the model, and limits
    beyond the model's positions.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: RewardInputOptions, model: PreTrainedModel) -> None:
        self.tokenizer = tokenizer
        self.options = options
        self._pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        if self._pad_token_id is None:
            raise InputError("the reward model's tokenizer has no pad and no EOS token; set pad_token in its folder")
        check_vocabulary(model, tokenizer)
        self.max_tokens = (
            options.max_prompt_tokens + options.max_response_tokens + tokenizer.num_special_tokens_to_add(pair=True)
        )
        _check_positions(model, self.max_tokens)
        line_break = len(tokenizer("\n", add_special_tokens=False)["input_ids"])
        self._prompts = PromptBuilder(
            tokenizer, options.prompt_template, options.max_prompt_tokens - line_break, options.num_queries
        )
        # The responses to one history come together, and step 3 meets a history again in each epoch.
        self._prompt = lru_cache(maxsize=4096)(self._render)
        self._has_segments = takes_segments(model)
        self._has_global_attention = accepts(model, "global_attention_mask")
        self._kernel, self._dtype = model.config._attn_implementation, model.dtype

    def encode(self, history: Sequence[Event], response: str) -> EncodedResponse:
        """Tokens of the newest events that fit and of the response, at most `max_tokens` together.

        Raises `InputError` when not even the newest event fits.
        """
        encoding = self.tokenizer(
            self._prompt(tuple(history)), response, return_offsets_mapping=True, return_token_type_ids=True
        )
        in_response = np.array([segment == 1 for segment in encoding.sequence_ids()])
        surplus = in_response & (in_response.cumsum() > self.options.max_response_tokens)
        kept = np.flatnonzero(~surplus)
        spans = [_NO_SPAN] * len(kept)
        for place in np.flatnonzero(in_response[kept]):
            start, end = encoding["offset_mapping"][kept[place]]
            spans[place] = (float(start), float(end))
        tokens = TokenSequence(
            np.array(encoding["input_ids"], dtype=np.int32)[kept],
            np.array(encoding["token_type_ids"], dtype=np.int8)[kept],
            in_response[kept],
        )
        return EncodedResponse(tokens, spans, split_words(response), int(surplus.sum()))

    def collate(self, sequences: Sequence[TokenSequence]) -> dict[str, torch.Tensor]:
        """The model's keyword arguments, each (B, T), padded on the right; the mask is made from lengths.

        With prefix attention it is (B, 1, T, T) and says which tokens each token sees.
        """
        batch = {
            "input_ids": pad_right([sequence.input_ids for sequence in sequences], self._pad_token_id),
            "attention_mask": pad_right([np.ones(len(sequence.input_ids)) for sequence in sequences], 0),
        }
        if self.options.prefix_attention:
            segments = [np.arange(len(sequence.input_ids)) >= response_begin(sequence) for sequence in sequences]
            batch["attention_mask"] = prefix_mask(pad_right(segments, PADDING), self._kernel, self._dtype)
        if self._has_segments:
            batch["token_type_ids"] = pad_right([sequence.token_types for sequence in sequences], 0)
        if self._has_global_attention:
            batch["global_attention_mask"] = pad_right([sequence.in_response for sequence in sequences], 0)
        return batch

    def _render(self, history: tuple[Event, ...]) -> str:
        prompt = self._prompts.text(history)
        return prompt if prompt.endswith("\n") else prompt + "\n"


def takes_segments(model: PreTrainedModel) -> bool:
    """Whether the model tells the history from the response by segment ids. Weights may be without storage."""
    return accepts(model, "token_type_ids") and getattr(model.config, "type_vocab_size", 0) > 1


def prefix_mask(segments: torch.Tensor, kernel: str, dtype: torch.dtype) -> torch.Tensor:
    """Which tokens each token of padded rows (B, T) sees with prefix attention: (B, 1, T, T) in the kernel's form."""
    return kernel_mask(visible(segments, causal=False), kernel, dtype)


def response_begin(sequence: TokenSequence) -> int:
    """Where the response begins; of one without a token the row's last token stands for it."""
    return int(sequence.in_response.argmax()) if sequence.in_response.any() else len(sequence.input_ids) - 1


def pad_right(rows: Sequence[Any], value: int) -> torch.Tensor:
    """One-dimensional arrays or lists of whole numbers as one int64 tensor (B, T)."""
    padded = np.full((len(rows), max(map(len, rows))), value, dtype=np.int64)
    for row, values in zip(padded, rows, strict=True):
        row[: len(values)] = values
    return torch.from_numpy(padded)


def _check_positions(model: PreTrainedModel, max_tokens: int) -> None:
    positions = usable_positions(model)
    if positions is not None and max_tokens > positions:
        raise InputError(
            f"history, response and special tokens may be {max_tokens} tokens, but the reward model has {positions} "
            "positions; lower --max_prompt_tokens or --max_response_tokens"
        )


def usable_positions(model: PreTrainedModel) -> int | None:
    """How many tokens the model can place; None when it sets no limit."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa's family counts positions from the padding index on.
            unused = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - unused
    if not getattr(model.config, "position_biased_input", True):
        return None  # DeBERTa reads distances between tokens alone
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)
