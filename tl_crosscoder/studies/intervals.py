"""Intervals of shares, and of means over tokens that are not independent: whole clusters (conversations) are drawn again."""

import math

import numpy as np
from jaxtyping import Float, Real
from scipy import stats

DRAWS_AT_ONCE = 512


def ratio_draws(
    sums: Real[np.ndarray, "cluster column"], counts: Real[np.ndarray, " cluster"], n: int, seed: int
) -> Float[np.ndarray, "draw column"]:
    """``n`` bootstrap draws of ``Σ sums / Σ counts``, every column from the same drawn clusters: differences of columns are paired.

    Clusters without a count are left out; with fewer than two left every draw is NaN.
    """
    used = counts > 0
    sums, counts = sums[used], counts[used]
    if len(counts) < 2:
        return np.full((n, sums.shape[1]), np.nan)
    rng, even = np.random.default_rng(seed), np.full(len(counts), 1 / len(counts))
    parts = []
    for start in range(0, n, DRAWS_AT_ONCE):
        # how often each cluster is drawn: the same as drawing them one by one, and one matrix product for all columns
        often = rng.multinomial(len(counts), even, size=min(DRAWS_AT_ONCE, n - start)).astype(float)
        parts.append((often @ sums) / (often @ counts)[:, None])
    return np.concatenate(parts)


def middle(draws: Float[np.ndarray, "draw *column"]) -> tuple[np.ndarray, np.ndarray]:
    """The ends of the middle 95 % of the draws, NaN where they are."""
    low, high = np.quantile(draws, [0.025, 0.975], axis=0)
    return np.asarray(low), np.asarray(high)


def t_interval(values: Real[np.ndarray, " n"]) -> tuple[float, float]:
    """The 95 % Student's t interval of the mean of independent values; NaN of fewer than two.

    Of three values it is 2.2 times as wide as 1.96 standard errors, which would hold the mean in four cases of five.
    """
    if len(values) < 2:
        return math.nan, math.nan
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return float(values.mean() - half), float(values.mean() + half)


def wilson(k: int, n: int) -> tuple[float, float, float]:
    """``k / n`` with its 95 % Wilson interval; NaN without a trial."""
    if not n:
        return math.nan, math.nan, math.nan
    interval = stats.binomtest(k, n).proportion_ci(method="wilson")
    return k / n, float(interval.low), float(interval.high)
