"""A query's score from the judgements of its words: by a fixed rule, or by one that query labels have taught."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

from common.feedback.annotator import mark_repeats
from common.text import Word, normalise

QueryRuleName = Literal["conjunction", "learned"]
RIDGE = 1e-3  # of a learned rule: with a few labels and like features the weights would run away


class QueryFeatures(NamedTuple):
    """What the class probabilities of a query's words say of it, each in [0, 1].

    `conjunction`: that no word is irrelevant and one is very relevant; `mean_fit` and `least_fit`: that a word is not
    irrelevant, on average and of the worst; `mean_score`: the words' mean score over its maximum; `one_very`: that one
    word or more is very relevant.
    """

    conjunction: float
    mean_fit: float
    least_fit: float
    mean_score: float
    one_very: float


class QueryRule(NamedTuple):
    """A logistic regression from `QueryFeatures` to a query's label in [0, 1]: their weights, and the bias."""

    weights: list[float]
    bias: float

    def __call__(self, features: Sequence[float]) -> float:
        """The label that is expected of a query with these features."""
        return float(expit(np.dot(self.weights, features) + self.bias))


def compose_query_scores(
    words: Sequence[Word], probabilities: Sequence[Sequence[float]], num_queries: int, rule: QueryRule | None = None
) -> list[float]:
    """Each query's score in [0, 1] from its words' class probabilities (W, 3); 0 without a word.

    Without a `rule` it is the chance that no word is irrelevant and one is very relevant: one wrong word spoils a
    query. A mean of word scores does not say so, and an output for queries learns it badly from one label a query
    (docs/results/findings.md). An annotator with another idea of a good query is met by a learned rule.
    """
    return score_queries(query_features(words, probabilities, num_queries), rule)


def score_queries(features: Sequence[QueryFeatures | None], rule: QueryRule | None = None) -> list[float]:
    """The scores of queries with these features, see `compose_query_scores`."""
    return [0.0 if of is None else of.conjunction if rule is None else rule(of) for of in features]


def query_features(
    words: Sequence[Word], probabilities: Sequence[Sequence[float]], num_queries: int
) -> list[QueryFeatures | None]:
    """Of each query, from its words' class probabilities (W, 3), taken for independent of each other; None without a
    word. A word that its query said before is irrelevant, as in every annotator's labels."""
    found: list[QueryFeatures | None] = []
    for line in range(num_queries):
        own = [place for place, word in enumerate(words) if word.line == line]
        repeats = mark_repeats([normalise(words[place].text) for place in own])
        judged = [
            (0.0, 0.0, 0.0) if repeated else (1 - probabilities[place][0], *probabilities[place][1:])
            for place, repeated in zip(own, repeats, strict=True)
        ]
        if not judged:
            found.append(None)
            continue
        fit, relevant, very = zip(*judged, strict=True)
        found.append(
            QueryFeatures(
                conjunction=max(0.0, math.prod(fit) - math.prod(relevant)),
                mean_fit=sum(fit) / len(fit),
                least_fit=min(fit),
                mean_score=sum(one / 2 + two for one, two in zip(relevant, very, strict=True)) / len(fit),
                one_very=1 - math.prod(1 - share for share in very),
            )
        )
    return found


def fit_query_rule(features: Sequence[Sequence[float]], labels: Sequence[float]) -> QueryRule:
    """The rule that explains `labels` (N,) in [0, 1] best from `features` (N, F): cross-entropy, a little ridge."""
    inputs, targets = np.array(features, dtype=float), np.array(labels, dtype=float)

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        weights, bias = parameters[:-1], parameters[-1]
        logits = inputs @ weights + bias
        value = np.mean(np.logaddexp(0, logits) - targets * logits) + RIDGE / 2 * weights @ weights
        error = (expit(logits) - targets) / len(targets)
        return float(value), np.append(inputs.T @ error + RIDGE * weights, error.sum())

    found = minimize(loss, np.zeros(inputs.shape[1] + 1), jac=True, method="L-BFGS-B").x
    return QueryRule(found[:-1].tolist(), float(found[-1]))
