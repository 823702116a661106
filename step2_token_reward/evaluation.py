"""How well a reward model does on held-out users: on tokens, on words (what step 3 uses) and on sentences."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from common.alignment import IGNORE_LABEL, NO_LINE
from common.models.query_score import QueryRule, fit_query_rule, query_features, score_queries
from common.models.reward_losses import judges_words, local_loss, without_class_weights
from common.models.reward_metrics import classification_metrics, sentence_metrics
from common.models.reward_options import NUM_CLASSES
from common.models.token_reward import query_index, seen_words, sentence_scores, word_probabilities
from step2_token_reward.dataset import LabelledResponse

_CLASSIFICATION = ("auc", "accuracy", *(f"accuracy_{label}" for label in range(NUM_CLASSES)))
METRIC_NAMES = (
    "loss", "local_loss", "global_loss", "sentence_mse", "sentence_spearman", "sentence_auc",
    *(f"{level}_{name}" for level in ("token", "word") for name in _CLASSIFICATION),
)  # fmt: skip


def held_out_metrics(
    predictions: Iterable[tuple[torch.Tensor, LabelledResponse]],
    class_weights: torch.Tensor,
    w: float,
    learns_query_rule: bool = False,
) -> tuple[dict[str, float], QueryRule | None]:
    """The measures of `METRIC_NAMES` over all predictions, outputs (T, N) of a response and its labels; and the query
    rule that they teach, if one is learned.

    Losses are those of the set as one batch. `sentence_*` judge the query scores that step 3 uses: composed of the
    words' (by a learned rule: for each half of the responses by what the other half teaches), or a sentence-level
    model's own, which has no measures of tokens and words. A measure that the data leave undefined (a class that does
    not occur) is NaN.
    """
    token_logits, token_classes, word_rows, word_classes = ([] for _ in range(4))
    trained, predicted, actual, features, halves = [], [], [], [], []
    for number, (logits, item) in enumerate(predictions):
        judged = without_class_weights(logits, class_weights) if judges_words(logits) else logits
        sentences = composed = sentence_scores(judged, item.encoded, len(item.query_scores))
        if judges_words(logits):
            labels = torch.tensor(item.labels)
            token_logits.append(logits[labels != IGNORE_LABEL])
            token_classes.append(labels[labels != IGNORE_LABEL])
            probabilities = word_probabilities(judged, item.encoded)
            seen = np.array(seen_words(item.encoded))
            word_rows.append(probabilities[seen].numpy())
            word_classes.append(np.array(item.word_labels)[seen])
            found = query_features(item.encoded.words, probabilities.tolist(), len(item.query_scores))
            composed = score_queries(found)
        for query in sorted(set(query_index(item.encoded)) - {NO_LINE}):
            trained.append(sentences[query])
            predicted.append(composed[query])
            actual.append(item.query_scores[query])
            if learns_query_rule:
                features.append(found[query])
                halves.append(number % 2)
    scores, rule = np.array(actual), None
    if features:
        rule = fit_query_rule(features, actual)
        predicted = _by_the_other_half(features, actual, halves)
    global_loss = sentence_metrics(np.array(trained), scores)["mse"]
    measures = {"global_loss": global_loss, **_named("sentence", sentence_metrics(np.array(predicted), scores))}
    if not token_logits:
        return {"loss": global_loss, **measures}, None
    logits, classes = torch.cat(token_logits), torch.cat(token_classes)
    local = local_loss(logits, classes, class_weights).item()
    tokens = without_class_weights(logits, class_weights).softmax(-1)
    measures = {
        "loss": w * local + (1 - w) * global_loss,
        "local_loss": local,
        **measures,
        **_named("token", classification_metrics(tokens.numpy(), classes.numpy())),
        **_named("word", classification_metrics(np.concatenate(word_rows), np.concatenate(word_classes))),
    }
    return measures, rule


def _by_the_other_half(
    features: Sequence[Sequence[float]], labels: Sequence[float], halves: Sequence[int]
) -> list[float]:
    """Each query's score by the rule that the responses of the other half teach; NaN where there are none."""
    rules = []
    for half in (0, 1):
        others = [place for place, own in enumerate(halves) if own != half]
        rules.append(fit_query_rule([features[o] for o in others], [labels[o] for o in others]) if others else None)
    return [
        math.nan if (rule := rules[half]) is None else rule(of) for of, half in zip(features, halves, strict=True)
    ]


def _named(level: str, metrics: dict[str, float]) -> dict[str, float]:
    return {f"{level}_{name}": value for name, value in metrics.items()}
