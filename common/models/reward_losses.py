"""Losses of the token-level reward model (docs/method.md, section 3), as pure functions.

Notation: B responses, T tokens, Q queries of the longest response, 3 classes (0 irrelevant, 1 relevant, 2 very
relevant). `labels` (B, T) holds classes, `IGNORE_LABEL` outside the valid zone; `query_index` (B, T) holds the
query's place in its response, `NO_LINE` outside the valid zone; `query_scores` (B, Q) holds sentence labels in
[0, 1]. A query of the batch is thus a pair (response, place); one without a token in the valid zone does not count.

Both losses are means over the data of one optimiser step. With gradient accumulation or several ranks that is no
mean of per-batch means, so each loss takes the denominator of the whole step: the parts then sum to the exact loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

from common.alignment import IGNORE_LABEL, NO_LINE
from common.errors import InputError
from common.models.reward_options import MAX_SCORE, NUM_CLASSES

# Far below any class weight: it only keeps 0/0 of a step without data at 0.
_SMALLEST_DENOMINATOR = 1e-12


class Denominators(NamedTuple):
    """What the local and the global loss are divided by, scalars: summed class weights and number of queries."""

    class_weights: Tensor
    queries: Tensor


class RewardLosses(NamedTuple):
    """Scalars: the weighted sum that is trained, and its two parts."""

    total: Tensor
    local_loss: Tensor
    global_loss: Tensor


def judges_words(logits: Tensor) -> bool:
    """Whether these outputs (..., N) are word classes; those of a sentence-level model are not."""
    return logits.shape[-1] == NUM_CLASSES


def expected_score(logits: Tensor) -> Tensor:
    """`E_p[c] = p_1 + 2 p_2` in [0, 2]; (..., 3) -> (...), in fp32."""
    return logits.float().softmax(dim=-1) @ torch.arange(NUM_CLASSES, dtype=torch.float32, device=logits.device)


def without_class_weights(logits: Tensor, class_weights: Tensor) -> Tensor:
    """The same outputs (..., 3) as if the local loss had weighed all classes (3,) alike.

    A cross-entropy weighted by w learns `w_c p_c / sum`, so rare classes look too likely: a bias of a quarter of a
    score with inverse class frequency. `logit_c - log w_c` gives p_c back (prior correction; Elkan 2001).
    """
    return logits - class_weights.log().to(logits.device)


def local_loss(logits: Tensor, labels: Tensor, class_weights: Tensor, denominator: Tensor | None = None) -> Tensor:
    """`-sum_{t in V} w_{c_t} log p(c_t) / sum_{t in V} w_{c_t}`.

    logits (B, T, 3), labels (B, T), class_weights (3,) -> scalar. `denominator` replaces the sum of these
    weights by that of the whole optimiser step; without any token in the valid zone the loss is 0.
    """
    log_probs = logits.float().log_softmax(dim=-1)
    weighted = F.nll_loss(
        log_probs.flatten(0, -2), labels.flatten(), class_weights, ignore_index=IGNORE_LABEL, reduction="sum"
    )
    denominator = summed_class_weights(labels, class_weights) if denominator is None else denominator
    return weighted / denominator.clamp_min(_SMALLEST_DENOMINATOR)


def predicted_sentences(logits: Tensor, query_index: Tensor, num_queries: int) -> tuple[Tensor, Tensor]:
    """What the global loss takes for each query's score, in [0, 1]: (B, Q), and which queries have any token: (B, Q).

    logits (B, T, N), query_index (B, T). With word classes it is `mean_{t in V_q} E_p[c_t] / 2`; the output z of a
    sentence-level model gives `sigmoid(mean_{t in V_q} z_t)`, a linear head on the mean hidden state of the query.
    """
    if judges_words(logits):
        means, present = query_means(expected_score(logits), query_index, num_queries)
        return means / MAX_SCORE, present
    means, present = query_means(logits[..., 0].float(), query_index, num_queries)
    return means.sigmoid(), present


def global_loss(logits: Tensor, query_index: Tensor, query_scores: Tensor, denominator: Tensor | None = None) -> Tensor:
    """`mean_q (s_q - predicted_q)^2` with `predicted_sentences`.

    logits (B, T, N), query_index (B, T), query_scores (B, Q) -> scalar. `denominator` replaces the number of these
    queries by that of the whole optimiser step.
    """
    predicted, present = predicted_sentences(logits, query_index, query_scores.shape[1])
    errors = (query_scores - predicted).masked_fill(~present, 0.0)
    denominator = present.sum() if denominator is None else denominator
    return errors.square().sum() / denominator.clamp_min(_SMALLEST_DENOMINATOR)


def token_reward_loss(
    logits: Tensor,
    labels: Tensor,
    query_index: Tensor,
    query_scores: Tensor,
    class_weights: Tensor,
    w: float,
    denominators: Denominators | None = None,
) -> RewardLosses:
    """`L = w L_local + (1 - w) L_global`; shapes as in `local_loss` and `global_loss`.

    The global loss sees the outputs without the class weights: with them the two losses would want different
    probabilities of the same word. Without word classes (N = 1) there is no local loss and `L = L_global`, whatever w
    is.
    """
    weight_sum, queries = denominators or (None, None)
    if not judges_words(logits):
        sentence = global_loss(logits, query_index, query_scores, queries)
        return RewardLosses(sentence, torch.zeros_like(sentence), sentence)
    sentence = global_loss(without_class_weights(logits, class_weights), query_index, query_scores, queries)
    local = local_loss(logits, labels, class_weights, weight_sum)
    return RewardLosses(w * local + (1 - w) * sentence, local, sentence)


def query_means(values: Tensor, query_index: Tensor, num_queries: int) -> tuple[Tensor, Tensor]:
    """Mean of `values` (B, T) over each query's tokens: means (B, Q), 0 for none, and which queries have any (B, Q)."""
    member = query_index.unsqueeze(-1) == torch.arange(num_queries, device=query_index.device)  # (B, T, Q)
    counts = member.sum(dim=1)
    sums = values.unsqueeze(-1).masked_fill(~member, 0.0).sum(dim=1)
    return sums / counts.clamp_min(1), counts > 0


def summed_class_weights(labels: Tensor, class_weights: Tensor) -> Tensor:
    """`sum_{t in V} w_{c_t}`: labels of any shape, class_weights (3,) -> scalar."""
    return class_weights[labels[labels != IGNORE_LABEL]].sum()


def count_queries(query_index: Tensor) -> Tensor:
    """Number of queries that have a token in the valid zone: query_index (B, T) -> scalar."""
    rows = torch.arange(len(query_index), device=query_index.device).unsqueeze(1).expand_as(query_index)
    valid = query_index != NO_LINE
    pairs = torch.stack([rows[valid], query_index[valid]], dim=1)
    return torch.tensor(len(pairs.unique(dim=0)), device=query_index.device)


def inverse_class_frequency(counts: Sequence[int]) -> list[float]:
    """Class weights `1 / count`, scaled to a mean of 1. Raises `InputError` where a class has no example."""
    empty = [label for label, count in enumerate(counts) if count == 0]
    if empty:
        raise InputError(
            f"no training token is labelled {' or '.join(map(str, empty))} (tokens per class: {list(counts)}), so "
            "inverse class frequency gives no weight; label more responses, or give --class_weights"
        )
    inverse = [1.0 / count for count in counts]
    return [value * len(inverse) / sum(inverse) for value in inverse]


def keep_classes(labels: Tensor, keep_ratios: Sequence[float], generator: torch.Generator) -> Tensor:
    """Class mask of the local loss: a token of class c stays with probability `keep_ratios[c]`, else it is ignored.

    labels (B, T) -> (B, T). The draw is made on the generator's device, so a step's draw is the same on any machine.
    """
    ratios = torch.tensor(keep_ratios)[labels.cpu().clamp_min(0)]  # any ratio will do for ignored tokens
    kept = torch.rand(labels.shape, generator=generator) < ratios
    return labels.masked_fill(~kept.to(labels.device), IGNORE_LABEL)
