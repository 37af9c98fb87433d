import math

import numpy as np
import pytest
from scipy import stats

from tl_crosscoder.studies.intervals import middle, ratio_draws, t_interval, wilson


def ends(sums, counts, n, seed):
    """The interval of one ratio."""
    low, high = middle(ratio_draws(sums[:, None], counts, n, seed)[:, 0])
    return float(low), float(high)


def test_the_interval_over_whole_clusters_covers_where_one_over_tokens_does_not():
    # 40 conversations of 25 tokens that share most of their deviation: the clusters, not the tokens, are independent
    rng, covered, naive, trials = np.random.default_rng(0), 0, 0, 300
    for trial in range(trials):
        values = 1 + rng.normal(size=(40, 1)) + 0.3 * rng.normal(size=(40, 25))
        low, high = ends(values.sum(1), np.full(40, 25), 300, trial)
        covered += low <= 1 <= high
        naive += abs(values.mean() - 1) <= 1.96 * values.std() / np.sqrt(values.size)
    # a percentile bootstrap of 40 clusters covers about 94 %
    assert stats.binomtest(covered, trials, 0.94).pvalue > 0.01
    assert naive < 0.5 * trials


def test_the_paired_difference_covers_and_is_narrower_than_two_intervals():
    rng, covered, widths = np.random.default_rng(1), 0, []
    for trial in range(200):
        shared = rng.normal(size=40)
        columns = np.stack([shared, shared - 0.2], 1) + 0.1 * rng.normal(size=(40, 2)) + 1
        draws = ratio_draws(columns, np.ones(40), 300, trial)
        low, high = middle(draws[:, 0] - draws[:, 1])
        covered += low <= 0.2 <= high
        widths.append(high - low)
    assert stats.binomtest(covered, 200, 0.94).pvalue > 0.01
    assert np.mean(widths) < 0.3  # one column alone is 0.6 wide


def test_the_interval_is_that_of_scipys_bootstrap():
    rng = np.random.default_rng(2)
    counts = rng.integers(1, 30, size=50)
    sums = counts * (1 + rng.normal(size=50))
    low, high = ends(sums, counts, 20_000, 0)
    want = stats.bootstrap(
        (sums, counts),
        lambda s, n, axis: s.sum(axis) / n.sum(axis),
        paired=True, vectorized=True, method="percentile", n_resamples=20_000, batch=1000,
        rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    assert (low, high) == pytest.approx((want.low, want.high), abs=0.02)


def test_too_few_clusters_give_nan():
    assert np.isnan(ends(np.array([3.0, 0.0]), np.array([2, 0]), 50, 0)).all()
    assert np.isnan(ends(np.zeros(2), np.zeros(2), 50, 0)).all()
    assert np.isnan(t_interval(np.array([1.0]))).all() and np.isnan(t_interval(np.zeros(0))).all()


def test_the_interval_of_a_mean_of_three_covers_it_as_often_as_it_says():
    drawn = np.random.default_rng(3).normal(size=(2000, 3))
    low, high = np.array([t_interval(values) for values in drawn]).T
    held = int(((low <= 0) & (high >= 0)).sum())
    assert stats.binomtest(held, 2000, 0.95).pvalue > 0.01
    normal = 1.96 * drawn.std(1, ddof=1) / 3**0.5
    assert (abs(drawn.mean(1)) <= normal).mean() < 0.85


def test_wilson_is_that_of_the_textbook():
    k, n, z = 3, 10, 1.959964
    centre, spread = (k / n + z**2 / 2 / n), z * math.sqrt(k / n * (1 - k / n) / n + z**2 / 4 / n**2)
    low, high = (centre - spread) / (1 + z**2 / n), (centre + spread) / (1 + z**2 / n)
    assert wilson(k, n) == pytest.approx((0.3, low, high), rel=1e-5)
    assert all(map(math.isnan, wilson(0, 0)))
