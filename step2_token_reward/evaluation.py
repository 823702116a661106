"""How well a reward model does on held-out users: on tokens, on words (what step 3 uses) and on sentences."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch

from common.alignment import IGNORE_LABEL, NO_LINE, pool_token_scores
from common.models.reward_losses import NUM_CLASSES, judges_words, local_loss, without_class_weights
from common.models.reward_metrics import classification_metrics, sentence_metrics
from common.models.token_reward import query_index, sentence_scores
from step2_token_reward.dataset import LabelledResponse

_CLASSIFICATION = ("auc", "accuracy", *(f"accuracy_{label}" for label in range(NUM_CLASSES)))
METRIC_NAMES = (
    "loss", "local_loss", "sentence_mse", "sentence_spearman", "sentence_auc",
    *(f"{level}_{name}" for level in ("token", "word") for name in _CLASSIFICATION),
)  # fmt: skip


def held_out_metrics(
    predictions: Iterable[tuple[torch.Tensor, LabelledResponse]], class_weights: torch.Tensor, w: float
) -> dict[str, float]:
    """The measures of `METRIC_NAMES` over all predictions: outputs (T, N) of a response and its labels.

    A sentence-level model (N = 1) has no measures of tokens and words.

    Losses are those of the set as one batch; `sentence_mse` is the global loss. A measure that the data leave
    undefined (a class that does not occur) is NaN.
    """
    token_logits, token_classes, word_probabilities, word_classes, predicted, actual = ([] for _ in range(6))
    for logits, item in predictions:
        sentences = sentence_scores(logits, item.encoded, len(item.query_scores))
        for query in sorted(set(query_index(item.encoded)) - {NO_LINE}):
            predicted.append(sentences[query])
            actual.append(item.query_scores[query])
        if not judges_words(logits):
            continue
        labels = torch.tensor(item.labels)
        valid = labels != IGNORE_LABEL
        token_logits.append(logits[valid])
        token_classes.append(labels[valid])
        probabilities = _word_probabilities(logits, class_weights)
        words, spans = item.encoded.words, item.encoded.spans
        pooled = [pool_token_scores(words, column, spans, missing=math.nan) for column in probabilities.T.tolist()]
        scored = ~np.isnan(pooled[0])
        word_probabilities.append(np.array(pooled).T[scored])
        word_classes.append(np.array(item.word_labels)[scored])
    sentences = sentence_metrics(np.array(predicted), np.array(actual))
    if not token_logits:
        return {"loss": sentences["mse"], **_named("sentence", sentences)}
    logits, classes = torch.cat(token_logits), torch.cat(token_classes)
    local = local_loss(logits, classes, class_weights).item()
    return {
        "loss": w * local + (1 - w) * sentences["mse"],
        "local_loss": local,
        **_named("sentence", sentences),
        **_named("token", classification_metrics(_word_probabilities(logits, class_weights).numpy(), classes.numpy())),
        **_named("word", classification_metrics(np.concatenate(word_probabilities), np.concatenate(word_classes))),
    }


def _word_probabilities(logits: torch.Tensor, class_weights: torch.Tensor) -> torch.Tensor:
    """Class probabilities (T, 3) as step 3 will see them; the scorer says when class weights are taken out."""
    if logits.shape[-1] > NUM_CLASSES:
        logits = without_class_weights(logits, class_weights)
    return logits[:, :NUM_CLASSES].softmax(-1)


def _named(level: str, metrics: dict[str, float]) -> dict[str, float]:
    return {f"{level}_{name}": value for name, value in metrics.items()}
