"""Rollouts made by hand: texts whose every character is a token, with rewards and numbers that a test chooses."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from common.alignment import NO_LINE, DecodedTokens
from common.data.records import Event, Example
from common.generation.generate import Generated
from common.models.sequences import pad_sequences
from step3_tppo.rewards import TokenRewards
from step3_tppo.rollout import Rollout


def example(number: int, *searched: str) -> Example:
    history = tuple(Event("search", query=query) for query in searched)
    return Example(f"e{number}", f"u{number}", f"u{number}", "test", "train", history, ("red hat",))


def made_rollout(
    texts: Sequence[str], histories: Sequence[Sequence[str]], rewards: Sequence[Sequence[float]] | None = None
) -> Rollout:
    """`texts` as responses that ended with EOS, one token a character; `rewards` (default 0) are the model's part."""
    sizes = [len(text) + 1 for text in texts]
    rewards = rewards or [[0.0] * size for size in sizes]
    batch = pad_sequences([[5]] * len(texts), [[7] * size for size in sizes], 1, torch.device("cpu"))
    shape = batch.response_mask.shape
    zeros = torch.zeros(shape)
    return Rollout(
        examples=[example(number, *history) for number, history in enumerate(histories)],
        generated=[
            Generated([7] * size, text, True, [0.0] * size) for size, text in zip(sizes, texts, strict=True)
        ],
        decoded=[
            DecodedTokens(text, [*((i, i + 1) for i in range(len(text))), (len(text), len(text))]) for text in texts
        ],
        word_scores=[[1.0] for _ in texts],
        parts=[
            TokenRewards(list(row), *([0.0] * len(row) for _ in range(3)), [NO_LINE] * len(row)) for row in rewards
        ],
        batch=batch, sampled_logprobs=zeros, old_logprobs=zeros, pending=torch.zeros(shape[0], dtype=torch.bool),
        reference_logprobs=zeros, kl=zeros, values=zeros, judged=None,
        rewards=torch.tensor([[*row, *[0.0] * (shape[1] - len(row))] for row in rewards]), seconds={},
    )  # fmt: skip
