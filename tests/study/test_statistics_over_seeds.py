"""Intervals over seeds and users against slow loops, closed forms and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from common.evaluation.statistics import crossed_estimate, t_estimate, wilson_estimate


def test_crossed_bootstrap_equals_a_slow_loop() -> None:
    values = np.array([[1.0, 0.0, 3.0], [2.0, np.nan, 5.0]])
    resamples, seed = 300, 3
    generator = np.random.default_rng(seed)
    seeds = generator.multinomial(2, [1 / 2] * 2, size=resamples)
    users = generator.multinomial(3, [1 / 3] * 3, size=resamples)
    means = []
    for s, u in zip(seeds, users, strict=True):
        drawn = [
            values[i, j]
            for i in range(2) for _ in range(s[i])
            for j in range(3) for _ in range(u[j])
            if not np.isnan(values[i, j])
        ]  # fmt: skip
        if drawn:
            means.append(np.mean(drawn))
    estimate = crossed_estimate(values, resamples, seed)
    assert estimate.value == pytest.approx(np.nanmean(values))
    assert (estimate.low, estimate.high) == pytest.approx(tuple(np.percentile(means, (2.5, 97.5))))


def test_crossed_bootstrap_with_one_seed_is_scipys_bootstrap_over_users() -> None:
    """The percentile bootstrap of a mean of 400 users; both draw at random, so the bounds agree to Monte Carlo error.

    A bound's error over B resamples is about sqrt(p (1 - p) / B) / density = .0022 sd / .058 = .04 standard errors
    of the mean at B = 5000; five of them are allowed.
    """
    values = np.random.default_rng(0).normal(0.3, 1.0, size=(1, 400))
    ours = crossed_estimate(values, 5000, 1)
    theirs = stats.bootstrap((values[0],), np.mean, n_resamples=5000, method="percentile", rng=2).confidence_interval
    tolerance = 5 * math.sqrt(2) * 0.04 * values.std() / math.sqrt(400)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=tolerance)


def test_seeds_that_disagree_widen_the_interval() -> None:
    users = np.random.default_rng(1).normal(size=200)
    same = np.stack([users] * 4)
    apart = same + np.array([[-1.0], [-0.3], [0.3], [1.0]])
    narrow, wide = (crossed_estimate(values, 2000, 0) for values in (same, apart))
    assert narrow.value == pytest.approx(wide.value)
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)


def test_paired_differences_are_narrower_than_unpaired_ones() -> None:
    generator = np.random.default_rng(2)
    users = generator.normal(size=300)
    first = users + 0.1 + 0.05 * generator.normal(size=(3, 300))
    second = users + 0.05 * generator.normal(size=(3, 300))
    paired = crossed_estimate(first - second, 2000, 0)
    unpaired = crossed_estimate(first - second[:, generator.permutation(300)], 2000, 0)
    assert paired.low > 0.08
    assert unpaired.high - unpaired.low > 5 * (paired.high - paired.low)


def test_student_interval_is_scipys() -> None:
    values = [0.41, 0.38, 0.44, 0.40, 0.43]
    low, high = stats.t.interval(0.95, 4, loc=np.mean(values), scale=stats.sem(values))
    estimate = t_estimate(values)
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((np.mean(values), low, high))
    assert t_estimate([0.4]).low is None
    assert t_estimate([]).value is None


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (3, 10), (450, 900), (900, 900)])
def test_wilson_interval_by_its_formula(successes: int, trials: int) -> None:
    z = 1.959963984540054
    p = successes / trials
    centre = (p + z**2 / (2 * trials)) / (1 + z**2 / trials)
    margin = z / (1 + z**2 / trials) * math.sqrt(p * (1 - p) / trials + z**2 / (4 * trials**2))
    estimate = wilson_estimate(successes, trials)
    assert estimate.value == p
    assert (estimate.low, estimate.high) == pytest.approx((centre - margin, centre + margin), abs=1e-9)
