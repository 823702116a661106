"""Bootstrap over users against a slow loop, closed forms and scipy."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from scipy import stats

from common.evaluation import statistics
from common.evaluation.statistics import estimate_means, paired_outcomes, resampled_means

NAN = math.nan
Z = stats.norm.ppf(0.975)


def percentile_error(resamples: int) -> float:
    """Monte Carlo standard error of a 2.5 % percentile, in standard errors of the mean, for a nearly normal mean."""
    return math.sqrt(0.025 * 0.975 / resamples) / stats.norm.pdf(Z)


def test_resampled_means_equal_a_loop_over_the_drawn_users() -> None:
    users = ["ann", "bob", "ann", "cid", "bob", "ann"]
    values = np.array([[1.0, NAN], [0.0, 3.0], [0.5, NAN], [1.0, 7.0], [0.0, NAN], [0.25, 1.0]])
    means = resampled_means(values, users, resamples=50, seed=3)
    draws = np.random.default_rng(3).multinomial(3, np.full(3, 1 / 3), size=50)
    for draw, mean in zip(draws, means, strict=True):
        for column in range(2):
            drawn = [
                values[row, column]
                for user, times in zip(["ann", "bob", "cid"], draw, strict=True)
                for _ in range(times)
                for row in range(6)
                if users[row] == user and not math.isnan(values[row, column])
            ]
            assert mean[column] == pytest.approx(sum(drawn) / len(drawn))


def test_draws_do_not_depend_on_the_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    values, users = np.random.default_rng(0).normal(size=(20, 2)), [f"u{i % 7}" for i in range(20)]
    whole = resampled_means(values, users, resamples=100, seed=1)
    monkeypatch.setattr(statistics, "_BLOCK_ENTRIES", 30)
    np.testing.assert_allclose(resampled_means(values, users, resamples=100, seed=1), whole, rtol=1e-12)


def test_the_interval_of_a_share_is_the_binomial_one() -> None:
    # The bootstrap distribution of a share over n users is exactly Binomial(n, share) / n.
    n, successes, resamples = 40, 16, 20_000
    low, high = stats.binom.ppf([0.025, 0.975], n, successes / n)
    margin = 5 * math.sqrt(0.025 * 0.975 / resamples)
    for step, percentile in ((low, 0.025), (high, 0.975)):  # the percentiles lie safely inside a step
        below, upto = stats.binom.cdf([step - 1, step], n, successes / n)
        assert below + margin < percentile < upto - margin
    values = np.array([[1.0]] * successes + [[0.0]] * (n - successes))
    (estimate,) = estimate_means(values, [str(i) for i in range(n)], resamples, seed=0)
    assert estimate.to_dict() == {
        "value": pytest.approx(0.4), "low": pytest.approx(low / n), "high": pytest.approx(high / n), "n": n
    }


def test_against_the_normal_closed_form_and_scipy() -> None:
    n, resamples = 200, 10_000
    values = np.random.default_rng(5).normal(1.0, 2.0, size=n)
    (estimate,) = estimate_means(values[:, None], [str(i) for i in range(n)], resamples, seed=0)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=resamples, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    error = values.std() / math.sqrt(n)  # standard deviation of a bootstrap mean
    tolerance = 5 * percentile_error(resamples) * error
    assert estimate.value == pytest.approx(values.mean())
    assert estimate.low == pytest.approx(theirs.low, abs=math.sqrt(2) * tolerance)
    assert estimate.high == pytest.approx(theirs.high, abs=math.sqrt(2) * tolerance)
    assert estimate.low == pytest.approx(values.mean() - Z * error, abs=tolerance)
    assert estimate.high == pytest.approx(values.mean() + Z * error, abs=tolerance)


def test_a_users_examples_are_drawn_together() -> None:
    values = np.random.default_rng(2).normal(size=(30, 1))
    users = [f"user{i}" for i in range(30)]
    (once,) = estimate_means(values, users, 2_000, seed=0)
    (thrice,) = estimate_means(np.repeat(values, 3, axis=0), np.repeat(users, 3), 2_000, seed=0)
    # Three equal examples a user tell nothing new, so the interval stays as wide as it was.
    assert (thrice.value, thrice.low, thrice.high) == pytest.approx((once.value, once.low, once.high))
    (apart,) = estimate_means(np.repeat(values, 3, axis=0), [str(i) for i in range(90)], 2_000, seed=0)
    assert apart.high - apart.low < 0.7 * (once.high - once.low)


def test_a_paired_difference_is_surer_than_two_intervals() -> None:
    generator = np.random.default_rng(4)
    earlier = generator.normal(size=100)
    later = earlier + 0.3 + 0.01 * generator.normal(size=100)
    columns = np.stack([earlier, later, later - earlier], axis=1)
    first, second, difference = estimate_means(columns, [str(i) for i in range(100)], 2_000, seed=0)
    assert difference.value == pytest.approx(second.value - first.value)
    assert difference.high - difference.low < 0.05 * (first.high - first.low)


def test_undefined_values_are_left_out() -> None:
    values = np.array([[1.0, NAN, NAN], [2.0, NAN, 5.0], [3.0, NAN, 7.0], [NAN, NAN, NAN]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        some, none, one_user = estimate_means(values, ["a", "b", "b", "c"], 500, seed=0)
    assert (some.value, some.n) == (pytest.approx(2.0), 3)
    assert some.low == pytest.approx(1.0)
    assert some.high == pytest.approx(2.5)
    assert none.to_dict() == {"value": None, "low": None, "high": None, "n": 0}
    assert one_user.to_dict() == {"value": 6.0, "low": None, "high": None, "n": 2}


def test_paired_outcomes() -> None:
    outcomes = paired_outcomes(np.array([1, 2 / 3, 0, 1 / 3]), np.array([2 / 3, 2 / 3, 1 / 3, 0]))
    assert outcomes.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0]]
