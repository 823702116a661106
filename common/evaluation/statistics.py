"""How sure a mean is: bootstrap intervals over users, alone and paired.

A user may have several examples, and they are alike; so users are drawn with replacement, each with all examples
(cluster bootstrap), and the interval is that between the 2.5 % and 97.5 % percentiles (Efron and Tibshirani 1993,
chapter 13). Every call with the same users and seed makes the same draws.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np

PERCENTILES = (2.5, 97.5)
# Bounds the memory of one block of draws, 8 bytes an entry.
_BLOCK_ENTRIES = 1 << 22


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over `n` examples with its 95 % interval; None where it is undefined."""

    value: float | None
    low: float | None
    high: float | None
    n: int

    def to_dict(self) -> dict[str, float | int | None]:
        """JSON form: `{value, low, high, n}`."""
        return asdict(self)


def resampled_means(values: np.ndarray, users: Sequence[str], resamples: int, seed: int) -> np.ndarray:
    """Means of each column over resampled users.

    `values` is (N, M), a row an example and a column a measure, NaN where the measure is undefined; `users` names
    the user of each row. Returns (resamples, M): the sum of the drawn examples' defined values over their number, NaN
    for a draw without any.
    """
    sums, counts = _user_sums(values, users)
    means = [
        np.divide(block @ sums, total, out=np.full(total.shape, np.nan), where=total > 0)
        for block in _draws(len(sums), resamples, seed)
        for total in [block @ counts]
    ]
    return np.concatenate(means)


def estimate_means(values: np.ndarray, users: Sequence[str], resamples: int, seed: int) -> list[Estimate]:
    """Mean and bootstrap interval of each column of `values` (N, M); see `resampled_means`.

    A column without a defined value has no mean, and one whose values come from a single user has no interval. Where
    all users are alike (a rate of exactly 0, say) the interval has no width: draws show nothing that was not seen.
    """
    means = resampled_means(values, users, resamples, seed)
    users_with_value = _user_sums(values, users)[1].astype(bool).sum(axis=0)
    return [
        _estimate(values[:, column], means[:, column], int(users_with_value[column]))
        for column in range(values.shape[1])
    ]


def paired_outcomes(later: np.ndarray, earlier: np.ndarray) -> np.ndarray:
    """Win, tie and lose of each item as columns of 0 and 1: (N, 3) from two systems' values (N,) on the same items."""
    return np.stack([later > earlier, later == earlier, later < earlier], axis=1).astype(float)


def _estimate(values: np.ndarray, means: np.ndarray, users_with_value: int) -> Estimate:
    defined = values[~np.isnan(values)]
    if not len(defined):
        return Estimate(None, None, None, 0)
    if users_with_value < 2:
        return Estimate(float(defined.mean()), None, None, len(defined))
    low, high = np.nanpercentile(means, PERCENTILES)
    return Estimate(float(defined.mean()), float(low), float(high), len(defined))


def _user_sums(values: np.ndarray, users: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of each user's defined values, both (users, M)."""
    names, owner = np.unique(np.asarray(users, dtype=str), return_inverse=True)
    sums = np.zeros((len(names), values.shape[1]))
    counts = np.zeros_like(sums)
    np.add.at(sums, owner, np.nan_to_num(values, nan=0.0))
    np.add.at(counts, owner, ~np.isnan(values))
    return sums, counts


def _draws(users: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Blocks of rows that say how often each user was drawn; `resamples` rows in all."""
    generator = np.random.default_rng(seed)
    share = np.full(users, 1 / users)
    rows = max(1, _BLOCK_ENTRIES // users)
    for start in range(0, resamples, rows):
        yield generator.multinomial(users, share, size=min(rows, resamples - start)).astype(float)
