"""From examples to token ids and labels: the loss sees the response and its EOS, whatever the pad token is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypedDict

import torch

from common.alignment import IGNORE_LABEL
from common.data.prompts import PromptBuilder
from common.data.records import Example
from common.errors import InputError
from common.progress import progress


class Row(TypedDict):
    """One training sequence: prompt, response, EOS; and where the response begins."""

    input_ids: list[int]
    prompt_length: int


class Rows(NamedTuple):
    """Training sequences, and how many examples were left out because their response is too long."""

    rows: list[Row]
    too_long: int


def build_rows(examples: Sequence[Example], builder: PromptBuilder, max_response_tokens: int) -> Rows:
    """Token ids of every example (of one split, at least one) whose response, EOS included, has at most
    `max_response_tokens`.

    A longer response is not cut: the model would learn to stop in the middle of a list. Raises `InputError` when an
    example has another number of targets than the prompt asks for, or nothing is left.
    """
    tokenizer = builder.tokenizer
    rows: list[Row] = []
    for example in progress(examples, desc="encode"):
        if len(example.targets) != builder.num_queries:
            raise InputError(
                f"example {example.id} has {len(example.targets)} targets, but --num_queries is {builder.num_queries}; "
                "set it to the number that the examples were cut with"
            )
        response = tokenizer(builder.response_text(example.targets), add_special_tokens=False)["input_ids"]
        if len(response) < max_response_tokens:
            prompt = builder.ids(example.history)
            ids = [*prompt, *response, tokenizer.eos_token_id]
            rows.append({"input_ids": ids, "prompt_length": len(prompt)})
    if not rows:
        raise InputError(
            f"none of the {len(examples)} {examples[0].split} examples has a response of at most {max_response_tokens} "
            "tokens; raise --max_response_tokens"
        )
    return Rows(rows, too_long=len(examples) - len(rows))


@dataclass(frozen=True, slots=True)
class PadRight:
    """Collates rows into `input_ids`, `attention_mask` and `labels`, each `(B, T)` with T the longest row.

    `labels` are the ids of the response and its EOS, `IGNORE_LABEL` on prompt and padding. They and the mask come from
    lengths alone: with pad = EOS, comparing ids to the pad token would take the real EOS for padding.
    """

    pad_token_id: int

    def __call__(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        """The padded batch."""
        width = max(len(row["input_ids"]) for row in rows)
        ids, mask, labels = [], [], []
        for row in rows:
            length, prompt = len(row["input_ids"]), row["prompt_length"]
            padding = width - length
            ids.append(row["input_ids"] + [self.pad_token_id] * padding)
            mask.append([1] * length + [0] * padding)
            labels.append([IGNORE_LABEL] * prompt + row["input_ids"][prompt:] + [IGNORE_LABEL] * padding)
        return {
            "input_ids": torch.tensor(ids),
            "attention_mask": torch.tensor(mask),
            "labels": torch.tensor(labels),
        }
