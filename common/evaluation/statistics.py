"""How sure a mean is: bootstrap intervals over users, alone and paired.

A user may have several examples, and they are alike; so users are drawn with replacement, each with all examples
(cluster bootstrap), and the interval is that between the 2.5 % and 97.5 % percentiles (Efron and Tibshirani 1993,
chapter 13). Every call with the same users and seed makes the same draws.

A study has a second source of chance, the seeds that models were trained with: `crossed_estimate` resamples both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache

import numpy as np
from scipy import stats

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
    """Win, tie and lose of each item as columns of 0 and 1: (N, 3) from two systems' values (N,) on the same items.

    An item on which a value is undefined (NaN) has no outcome: its row is NaN.
    """
    outcomes = np.stack([later > earlier, later == earlier, later < earlier], axis=1).astype(float)
    outcomes[np.isnan(later) | np.isnan(earlier)] = np.nan
    return outcomes


def crossed_estimate(values: np.ndarray, resamples: int, seed: int) -> Estimate:
    """Mean of `values` (S, U), one row a training seed and one column a user, with an interval over both.

    Seeds and users are drawn with replacement, each for itself, and every draw takes all pairs of what was drawn (the
    pigeonhole bootstrap; Owen 2007, who shows that its variance is not too small). NaN values are left out. With one
    seed the interval is over users alone, with one user over seeds.
    """
    present = ~np.isnan(values)
    filled = np.where(present, values, 0.0)
    counts = _crossed_counts(values.shape, resamples, seed)
    totals = np.einsum("rs,su,ru->r", counts[0], filled, counts[1], optimize=True)
    weights = np.einsum("rs,su,ru->r", counts[0], present.astype(float), counts[1], optimize=True)
    if not present.any():
        return Estimate(None, None, None, 0)
    low, high = np.percentile(totals[weights > 0] / weights[weights > 0], PERCENTILES)
    return Estimate(float(values[present].mean()), float(low), float(high), int(present.sum()))


@lru_cache(maxsize=2)  # drawing them takes ten times as long as using them, and a study's tables share one shape
def _crossed_counts(shape: tuple[int, ...], resamples: int, seed: int) -> list[np.ndarray]:
    """How often each resample holds each seed and each user: (R, S) and (R, U)."""
    generator = np.random.default_rng(seed)
    return [generator.multinomial(size, np.full(size, 1 / size), size=resamples).astype(float) for size in shape]


def t_estimate(values: Sequence[float]) -> Estimate:
    """Mean of a few independent numbers (one a seed) with Student's 95 % interval; no interval for a single one."""
    if len(values) < 2:
        return Estimate(float(values[0]) if len(values) else None, None, None, len(values))
    mean, error = float(np.mean(values)), float(stats.sem(values))
    margin = error * float(stats.t.ppf(PERCENTILES[1] / 100, len(values) - 1))
    return Estimate(mean, mean - margin, mean + margin, len(values))


def wilson_estimate(successes: int, trials: int) -> Estimate:
    """A share of independent yes-or-no items with Wilson's 95 % score interval."""
    interval = stats.binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    return Estimate(successes / trials, float(interval.low), float(interval.high), trials)


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
