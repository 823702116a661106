"""From labelled responses to token labels, whatever the reward model's tokenizer is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from common.alignment import IGNORE_LABEL, NO_LINE, token_labels
from common.errors import InputError
from common.feedback.annotator import Annotation
from common.feedback.labels import sample_item
from common.models.reward_encoder import EncodedResponse, RewardEncoder, TokenSequence, pad_right
from common.models.reward_options import MAX_SCORE, NUM_CLASSES
from common.models.token_reward import query_index
from common.progress import progress


class Row(TypedDict):
    """One response as the Trainer holds it: what the model reads, and labels of its tokens (T) and queries (Q).

    `row` is its place in the data set; `input_ids` repeats those of `tokens` for the sampler, which sorts by length.
    """

    row: int
    input_ids: np.ndarray
    tokens: TokenSequence
    labels: np.ndarray
    query_index: np.ndarray
    query_scores: list[float]


@dataclass(frozen=True, slots=True)
class LabelledResponse:
    """An encoded response with the label of each word (0, 1, 2) and each query's sentence label in [0, 1]."""

    encoded: EncodedResponse
    word_labels: list[int]
    query_scores: list[float]

    @property
    def labels(self) -> list[int]:
        """Token labels, `IGNORE_LABEL` outside the valid zone (T)."""
        return token_labels(self.encoded.words, self.word_labels, self.encoded.spans)

    @property
    def has_words(self) -> bool:
        """Whether any token is in the valid zone."""
        return any(line != NO_LINE for line in query_index(self.encoded))

    def row(self, place: int) -> Row:
        """This response as a row of a data set."""
        return {
            "row": place,
            "input_ids": self.encoded.tokens.input_ids,
            "tokens": self.encoded.tokens,
            "labels": np.array(self.labels, dtype=np.int8),
            "query_index": np.array(query_index(self.encoded), dtype=np.int16),
            "query_scores": self.query_scores,
        }


class RewardData(NamedTuple):
    """Rows to train on, held-out responses to judge by, and what was left out of both or cut."""

    train: list[Row]
    held_out: list[LabelledResponse]
    without_words: int
    cut: int

    @property
    def class_counts(self) -> list[int]:
        """Training tokens of each class."""
        return [sum(int((row["labels"] == label).sum()) for row in self.train) for label in range(NUM_CLASSES)]


def build_data(labelled: Iterable[tuple[dict[str, Any], Annotation]], encoder: RewardEncoder) -> RewardData:
    """Encode the responses of the splits 'train' and 'dev' and carry their labels to tokens.

    A response without a word teaches nothing and is left out. Raises `InputError` when a split ends up empty.
    """
    train: list[Row] = []
    held_out: list[LabelledResponse] = []
    without_words = cut = 0
    for sample, item in _encode(labelled, encoder):
        cut += item.encoded.dropped_tokens > 0
        if not item.has_words:
            without_words += 1
        elif sample["split"] == "train":
            train.append(item.row(len(train)))
        else:
            held_out.append(item)
    for name, rows in (("train", train), ("dev", held_out)):
        if not rows:
            raise InputError(f"no labelled response with a word in the split '{name}'; sample and label that split too")
    return RewardData(train, held_out, without_words, cut)


def _encode(
    labelled: Iterable[tuple[dict[str, Any], Annotation]], encoder: RewardEncoder
) -> Iterator[tuple[dict[str, Any], LabelledResponse]]:
    for sample, annotation in progress(labelled, desc="encode"):
        if sample["split"] not in ("train", "dev"):
            continue
        encoded = encoder.encode(sample_item(sample).history, sample["response"])
        word_labels = [score for scores in annotation.word_scores for score in scores]
        yield sample, LabelledResponse(encoded, word_labels, [score / MAX_SCORE for score in annotation.query_scores])


@dataclass(frozen=True, slots=True)
class RewardCollator:
    """Pads rows into the model's inputs, `labels` and `query_index` (B, T), `query_scores` (B, Q) and `row` (B,)."""

    encoder: RewardEncoder

    def __call__(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        """The padded batch; a query that is not there is never pointed to, so its score does not matter."""
        scores = [torch.tensor(row["query_scores"]) for row in rows]
        return {
            **self.encoder.collate([row["tokens"] for row in rows]),
            "labels": pad_right([row["labels"] for row in rows], IGNORE_LABEL),
            "query_index": pad_right([row["query_index"] for row in rows], NO_LINE),
            "query_scores": pad_sequence(scores, batch_first=True),
            "row": torch.tensor([row["row"] for row in rows]),
        }
