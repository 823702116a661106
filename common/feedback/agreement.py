"""How far two annotators agree: confusion, share of equal scores, quadratic kappa."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.evaluation.statistics import wilson_estimate
from common.feedback.annotator import RELEVANT_FROM, SCORES, Annotation

WEAK_KAPPA = 0.4  # "fair" ends here (Landis and Koch 1977): labels below it teach little that another would confirm


@dataclass(frozen=True)
class Agreement:
    """Two raters on the same words and queries: (3, 3) counts, a row a score of the first, a column of the second."""

    words: np.ndarray
    queries: np.ndarray

    def to_dict(self) -> dict[str, Any]:
        """JSON form: for words and queries the counts, agreement with Wilson's interval, kappa and shares of scores."""
        relevant = _relevant_agreement(self.queries)
        return {
            "words": _measures(self.words),
            "queries": {**_measures(self.queries), "relevant_agreement": relevant},
        }


def measure_agreement(pairs: Iterable[tuple[Annotation, Annotation]]) -> Agreement:
    """Confusion counts over all words and all queries of `pairs`, annotations of the same responses."""
    words = np.zeros((len(SCORES), len(SCORES)), dtype=int)
    queries = np.zeros_like(words)
    for first, second in pairs:
        for line, other in zip(first.word_scores, second.word_scores, strict=True):
            np.add.at(words, (list(line), list(other)), 1)
        np.add.at(queries, (list(first.query_scores), list(second.query_scores)), 1)
    return Agreement(words, queries)


def quadratic_kappa(counts: np.ndarray) -> float | None:
    """Cohen's kappa with quadratic weights (Cohen 1968) of a square table of counts.

    1 minus the mean squared difference of the two scores over the one expected of raters with the same shares of
    scores who do not look; None where nothing but one score occurs, and chance cannot be told from agreement.
    """
    total = counts.sum()
    scores = np.arange(len(counts))
    weights = (scores[:, None] - scores[None, :]) ** 2
    expected = counts.sum(axis=1)[:, None] * counts.sum(axis=0)[None, :] / total if total else counts
    by_chance = (weights * expected).sum()
    return float(1 - (weights * counts).sum() / by_chance) if by_chance else None


def render_agreement(agreement: Agreement, first: str, second: str, responses: int) -> str:
    """The measures as text for a terminal, with a warning where labels are hardly better than chance."""
    lines = [f"{responses} responses labelled by both", f"  first   {first}", f"  second  {second}"]
    for name, measures in agreement.to_dict().items():
        total, share = measures["n"], measures["agreement"]
        if not total:
            lines.append(f"{name}: none")
            continue
        kappa = measures["quadratic_kappa"]
        lines += [
            "",
            f"{name}: {total}, equal {share['value']:.2%} [{share['low']:.2%}, {share['high']:.2%}], "
            f"quadratic kappa {'undefined (one score only)' if kappa is None else f'{kappa:.3f}'}",
            *_confusion_lines(measures["counts"]),
        ]
        if "relevant_agreement" in measures:
            lines.append(f"  relevant or not: equal {measures['relevant_agreement']:.2%}")
        if kappa is not None and kappa < WEAK_KAPPA:
            lines.append(
                f"  warning: kappa below {WEAK_KAPPA}: the two hardly agree beyond chance. Read some of the labels, "
                "then try a stronger model or another template before training on them"
            )
    return "\n".join(lines)


def _measures(counts: np.ndarray) -> dict[str, Any]:
    total, equal = int(counts.sum()), int(np.trace(counts))
    return {
        "n": total,
        "counts": counts.tolist(),
        "agreement": wilson_estimate(equal, total).to_dict() if total else None,
        "quadratic_kappa": quadratic_kappa(counts),
        "shares": [_shares(counts.sum(axis=1)), _shares(counts.sum(axis=0))],
    }


def _shares(counts: np.ndarray) -> list[float]:
    return [float(count / max(counts.sum(), 1)) for count in counts]


def _relevant_agreement(counts: np.ndarray) -> float | None:
    total = counts.sum()
    both = counts[RELEVANT_FROM:, RELEVANT_FROM:].sum() + counts[:RELEVANT_FROM, :RELEVANT_FROM].sum()
    return float(both / total) if total else None


def _confusion_lines(counts: list[list[int]]) -> list[str]:
    width = max(len(str(count)) for row in counts for count in row) + 2
    head = "  first \\ second " + "".join(str(score).rjust(width) for score in SCORES)
    rows = [
        f"  {score}".ljust(len("  first \\ second ")) + "".join(str(count).rjust(width) for count in counts[score])
        for score in SCORES
    ]
    return [head, *rows]
