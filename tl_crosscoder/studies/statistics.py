"""The statistics that several studies share, thin over scipy: small exact tests, intervals, and what a null can exclude.

Too few data give NaN, never a warning.  All random draws are seeded."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Integer
from scipy import stats

Interval = tuple[float, float]
UNKNOWN = (math.nan, math.nan)
SPARSE = 10  # with fewer values off zero a normal approximation claims too much


@dataclass(frozen=True)
class McNemar:
    """Paired yes/no outcomes: ``b`` were right only before, ``c`` only after.

    ``p``: exact, two-sided, of b against c.  ``difference``: (b − c) / n, what was lost.  ``cohens_g``: b / (b + c) − ½, NaN
    without a discordant pair.  ``discordance``: (b + c) / n.
    """

    b: int
    c: int
    n: int
    p: float

    @property
    def difference(self) -> float:
        return (self.b - self.c) / self.n

    @property
    def cohens_g(self) -> float:
        return self.b / (self.b + self.c) - 0.5 if self.b + self.c else math.nan

    @property
    def discordance(self) -> float:
        return (self.b + self.c) / self.n


def mcnemar(before: Bool[np.ndarray, " n"], after: Bool[np.ndarray, " n"]) -> McNemar:
    """The exact McNemar test; without a discordant pair p is 1."""
    b, c = int((before & ~after).sum()), int((~before & after).sum())
    p = float(stats.binomtest(b, b + c, 0.5).pvalue) if b + c else 1.0
    return McNemar(b, c, len(before), p)


def mean_interval(values: Float[np.ndarray, " n"], *, n_resamples: int = 10_000, seed: int = 0) -> Interval:
    """95 % percentile interval of the mean: of paired differences, the paired bootstrap.  NaN with fewer than two values."""
    return _bootstrap((values,), lambda x, axis: x.mean(axis), n_resamples, seed)


def gap_interval(
    a: Float[np.ndarray, " n"], b: Float[np.ndarray, " m"], *, n_resamples: int = 10_000, seed: int = 0
) -> Interval:
    """95 % percentile interval of mean(a) − mean(b), the two drawn apart.  NaN where one has fewer than two values."""
    return _bootstrap((a, b), lambda x, y, axis: x.mean(axis) - y.mean(axis), n_resamples, seed)


def _bootstrap(samples: tuple[np.ndarray, ...], statistic, n_resamples: int, seed: int) -> Interval:
    if min(map(len, samples)) < 2:
        return UNKNOWN
    found = stats.bootstrap(
        samples,
        statistic,
        vectorized=True,
        method="percentile",
        n_resamples=n_resamples,
        batch=512,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)


def equivalence_p(differences: Float[np.ndarray, " n"], margin: float) -> float:
    """p of "the mean difference lies outside ± margin": small where the two are equivalent (two one-sided t-tests).

    ``differences`` lie in [−1, 1].  Where fewer than ten are not zero, p is instead the chance of so few in ``n`` when a share
    ``margin`` of them differs, the least that such a mean needs: exact, where the t-test would claim too much.  NaN without data.
    """
    differences = np.asarray(differences, float)
    if len(differences) and np.abs(differences).max() > 1:
        raise ValueError("equivalence_p wants differences of outcomes between 0 and 1.")
    if len(differences) < 2:
        return math.nan
    nonzero = int(np.count_nonzero(differences))
    if nonzero < SPARSE:
        inside = abs(differences.mean()) < margin
        return float(stats.binom.cdf(nonzero, len(differences), margin)) if inside else 1.0
    if differences.std() == 0:
        return 1.0  # every one differs alike: no more inside the margin than that value is, and it is no small one
    above = stats.ttest_1samp(differences, -margin, alternative="greater")
    below = stats.ttest_1samp(differences, margin, alternative="less")
    return max(_p(above), _p(below))


def minimum_detectable_effect(
    discordance: float, n: int, *, alpha: float = 0.05, power: float = 0.8
) -> float:
    """The smallest paired difference in a rate that ``n`` pairs find with this power: (z_{1−α/2} + z_power) √(ψ / n), at most 1.

    ψ is the share of pairs that differ; .2 among 100 gives .125.  Where a pair never differed, estimate ψ by ``discordance_of``.
    """
    if n < 1:
        return math.nan
    z = stats.norm.ppf(1 - alpha / 2) + stats.norm.ppf(power)
    return float(min(1.0, z * math.sqrt(discordance / n)))


def discordance_of(test: McNemar) -> float:
    """(b + c + 1) / (n + 2): never 0, since no number of pairs shows that none differs."""
    return (test.b + test.c + 1) / (test.n + 2)


def poisson_interval(count: int, confidence: float = 0.95) -> Interval:
    """Exact interval of a Poisson mean of which ``count`` was seen (Garwood 1936)."""
    tail = (1 - confidence) / 2
    low = stats.chi2.ppf(tail, 2 * count) / 2 if count else 0.0
    return float(low), float(stats.chi2.ppf(1 - tail, 2 * count + 2) / 2)


def ratio_of_counts(a: int, b: int) -> tuple[float, float, float]:
    """a / b of two Poisson counts with its exact 95 % interval, from the binomial that a is of a + b; NaN where both are 0."""
    if a + b == 0:
        return math.nan, *UNKNOWN
    share = stats.binomtest(a, a + b).proportion_ci(method="exact")
    odds = [s / (1 - s) if s < 1 else math.inf for s in (share.low, share.high)]
    return (a / b if b else math.inf), odds[0], odds[1]


def holm(p: Sequence[float]) -> list[float]:
    """The p-values adjusted for having asked so many questions (Holm 1979); NaN stays, and counts as not asked."""
    values = np.asarray(p, float)
    asked = np.flatnonzero(~np.isnan(values))
    order = asked[np.argsort(values[asked], kind="stable")]
    scaled = values[order] * np.arange(len(order), 0, -1)
    values[order] = np.minimum(np.maximum.accumulate(scaled), 1)
    return values.tolist()


def cohens_dz(differences: Float[np.ndarray, " n"]) -> float:
    """Mean over standard deviation of paired differences; NaN where they do not vary."""
    if len(differences) < 2 or (spread := float(np.std(differences, ddof=1))) == 0:
        return math.nan
    return float(np.mean(differences)) / spread


def signed_rank_p(differences: Float[np.ndarray, " n"]) -> float:
    """Wilcoxon's signed-rank test of paired differences, two-sided; 1 where none differs."""
    differences = np.asarray(differences, float)
    if not np.count_nonzero(differences):
        return 1.0 if len(differences) else math.nan
    return _p(stats.wilcoxon(differences[differences != 0]))


def correlation(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]) -> float:
    """Pearson's; NaN where either is constant up to rounding."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    return float(_correlations(x, y, np.ones_like(x)))


def rank_correlation(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]) -> float:
    """Spearman's; NaN where either is constant."""
    return correlation(stats.rankdata(x), stats.rankdata(y))


def partial_correlation(
    x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"], given: Float[np.ndarray, " n"]
) -> float:
    """Pearson's of what is left of x and y after each is fitted by 1, ``given`` and ``given`` squared.

    NaN where nothing is left, and with fewer than five values.
    """
    x, y, given = (np.asarray(values, float) for values in (x, y, given))
    if len(x) < 5 or _constant(x) or _constant(y):
        return math.nan
    centre = (given - given.mean()) / (given.std() or 1.0)
    design = np.stack([np.ones_like(given), centre, centre**2], 1)
    left = [values - design @ np.linalg.lstsq(design, values, rcond=None)[0] for values in (x, y)]
    if any(rest.std() <= 1e-9 * whole.std() for rest, whole in zip(left, (x, y), strict=True)):
        return math.nan
    return correlation(*left)


def correlation_interval(
    x: Float[np.ndarray, " n"],
    y: Float[np.ndarray, " n"],
    *,
    clusters: Integer[np.ndarray, " n"] | None = None,
    n_resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """95 % percentile interval of Pearson's, pairs resampled together, and all of a cluster; NaN where either is constant.

    A resample in which one is constant says nothing and is left out.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    names, owner = np.unique(np.arange(len(x)) if clusters is None else clusters, return_inverse=True)
    if len(x) < 3 or len(names) < 2 or _constant(x) or _constant(y):
        return UNKNOWN
    even = np.full(len(names), 1 / len(names))
    often = np.random.default_rng(seed).multinomial(len(names), even, size=n_resamples)[:, owner]
    found = _correlations(x, y, often.astype(float))
    found = found[~np.isnan(found)]
    return (float(np.quantile(found, 0.025)), float(np.quantile(found, 0.975))) if len(found) > 1 else UNKNOWN


def _correlations(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """For each row of weights."""
    total = weights.sum(-1, keepdims=True)
    a, b = (v - (weights * v).sum(-1, keepdims=True) / total for v in (x, y))
    size = np.sqrt((weights * a * a).sum(-1) * (weights * b * b).sum(-1))
    flat = size <= 1e-12 * len(x) * np.abs(x).max() * np.abs(y).max()
    return np.where(flat, np.nan, (weights * a * b).sum(-1) / np.where(flat, 1.0, size))


def _p(found: Any) -> float:
    return float(found.pvalue)  # scipy's results are of types that it does not name


def _constant(x: np.ndarray) -> bool:
    return bool(np.ptp(x) <= 1e-12 * np.abs(x).max(initial=0))
