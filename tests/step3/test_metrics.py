"""What a rollout's responses show, against numbers made by hand; each number is that of all ranks together."""

from __future__ import annotations

import pytest
import torch

from step3_tppo.metrics import rollout_metrics
from tests.distributed.ranks import run_on_ranks
from tests.step3.rollouts import made_rollout

# With k = 2. Written: "red hat" (copied: normal form), "blue hat" | "coat", "" (no query) | "red hat", "red hat now",
# and "coat", which is past the second line. Copied: 1 + 1 + 0 of 5.
TEXTS = ["Red  HAT!\nblue hat", "coat\n", "red hat\nred hat now\ncoat"]
HISTORIES = [["red hat", "tie"], ["coat"], ["tie", "coat"]]
# Bigrams: red hat, blue hat, red hat, red hat, hat now: three of five.
COPY_RATE, DISTINCT_2 = 2 / 5, 3 / 5


def measured(texts: list[str], histories: list[list[str]]) -> dict[str, float]:
    rollout = made_rollout(texts, histories)
    zeros = torch.zeros_like(rollout.values)
    return rollout_metrics(rollout, zeros, zeros, zeros, k=2)


def _on_a_rank(rank: int, world_size: int) -> dict[str, float]:
    return measured(TEXTS[rank::world_size], HISTORIES[rank::world_size])


def test_copies_and_distinct_bigrams_by_hand() -> None:
    found = measured(TEXTS, HISTORIES)
    assert found["response/copy_rate"] == pytest.approx(COPY_RATE)
    assert found["response/distinct_2"] == pytest.approx(DISTINCT_2)


def test_a_rollout_that_says_nothing_has_no_copies_and_no_bigrams() -> None:
    found = measured(["", "\n"], [["red hat"], [""]])
    assert (found["response/copy_rate"], found["response/distinct_2"]) == (0.0, 0.0)


@pytest.mark.distributed
def test_ranks_share_their_bigrams_and_copies() -> None:
    """"red hat" is said on both ranks and is one distinct bigram, which no sum over ranks would tell."""
    for found in run_on_ranks(_on_a_rank, 2):
        assert found["response/copy_rate"] == pytest.approx(COPY_RATE)
        assert found["response/distinct_2"] == pytest.approx(DISTINCT_2)
