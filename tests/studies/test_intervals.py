import math

import numpy as np
import pytest
from scipy import stats

from tl_crosscoder.studies.intervals import middle, ratio_draws, ratio_interval, wilson


def test_the_interval_over_whole_clusters_covers_where_one_over_tokens_does_not():
    # 40 conversations of 25 tokens that share most of their deviation: the clusters, not the tokens, are independent
    rng, covered, naive, trials = np.random.default_rng(0), 0, 0, 300
    for trial in range(trials):
        values = 1 + rng.normal(size=(40, 1)) + 0.3 * rng.normal(size=(40, 25))
        _, low, high = ratio_interval(values.sum(1), np.full(40, 25), 300, trial)
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
    value, low, high = ratio_interval(sums, counts, 20_000, 0)
    want = stats.bootstrap(
        (sums, counts),
        lambda s, n, axis: s.sum(axis) / n.sum(axis),
        paired=True, vectorized=True, method="percentile", n_resamples=20_000, batch=1000,
        rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    assert value == pytest.approx(sums.sum() / counts.sum())
    assert (low, high) == pytest.approx((want.low, want.high), abs=0.02)


def test_too_few_clusters_give_nan():
    value, low, high = ratio_interval(np.array([3.0, 0.0]), np.array([2, 0]), 50, 0)
    assert value == 1.5 and np.isnan([low, high]).all()
    assert np.isnan(ratio_interval(np.zeros(2), np.zeros(2), 50, 0)).all()


def test_wilson_is_that_of_the_textbook():
    k, n, z = 3, 10, 1.959964
    centre, spread = (k / n + z**2 / 2 / n), z * math.sqrt(k / n * (1 - k / n) / n + z**2 / 4 / n**2)
    low, high = (centre - spread) / (1 + z**2 / n), (centre + spread) / (1 + z**2 / n)
    assert wilson(k, n) == pytest.approx((0.3, low, high), rel=1e-5)
    assert all(map(math.isnan, wilson(0, 0)))
