"""Each statistic against a printed table, a naive loop, or many simulated data sets whose truth is known."""

import math

import numpy as np
import pytest
from scipy import stats

from tl_crosscoder.analysis.matching_nulls import p_value
from tl_crosscoder.studies.statistics import (
    McNemar,
    cohens_dz,
    correlation,
    correlation_interval,
    discordance_of,
    equivalence_p,
    gap_interval,
    holm,
    mcnemar,
    mean_interval,
    minimum_detectable_effect,
    partial_correlation,
    poisson_interval,
    rank_correlation,
    ratio_of_counts,
    signed_rank_p,
)


def outcomes(b, c, both, neither):
    before = np.array([1] * b + [0] * c + [1] * both + [0] * neither, dtype=bool)
    after = np.array([0] * b + [1] * c + [1] * both + [0] * neither, dtype=bool)
    return before, after


@pytest.mark.parametrize(("b", "c"), [(10, 2), (3, 3), (0, 6), (1, 0), (25, 11)])
def test_mcnemar_is_twice_the_smaller_binomial_tail(b, c):
    tail = sum(math.comb(b + c, k) for k in range(min(b, c) + 1)) / 2 ** (b + c)
    found = mcnemar(*outcomes(b, c, 5, 7))
    assert (found.b, found.c, found.n) == (b, c, b + c + 12)
    assert found.p == pytest.approx(min(1, 2 * tail))
    assert found.difference == (b - c) / found.n and found.cohens_g == b / (b + c) - 0.5


def test_mcnemar_without_a_discordant_pair_says_nothing():
    found = mcnemar(*outcomes(0, 0, 3, 2))
    assert found.p == 1 and found.difference == 0 and math.isnan(found.cohens_g)


def test_mcnemar_cries_wolf_no_more_often_than_it_says():
    rng, wolves = np.random.default_rng(0), 0
    for _ in range(500):  # both arms right on the same share of prompts, independently
        before, after = rng.random((2, 100)) < 0.7
        wolves += mcnemar(before, after).p <= 0.05
    assert wolves / 500 <= 0.05


def test_a_true_effect_of_the_minimum_detectable_size_is_found_about_four_times_in_five():
    # discordance .2 of 100 prompts: 12.5 points.  The exact test is a little weaker than the formula's normal one.
    effect = minimum_detectable_effect(0.2, 100)
    assert effect == pytest.approx(2.8016 * math.sqrt(0.2 / 100), rel=1e-4) == pytest.approx(0.1253, abs=1e-4)
    rng, found = np.random.default_rng(1), 0
    for _ in range(400):
        kind = rng.choice(3, size=100, p=[(0.2 + effect) / 2, (0.2 - effect) / 2, 0.8])
        found += mcnemar(*outcomes((kind == 0).sum(), (kind == 1).sum(), (kind == 2).sum(), 0)).p <= 0.05
    assert 0.68 < found / 400 < 0.92
    assert minimum_detectable_effect(1.0, 4) == 1 and math.isnan(minimum_detectable_effect(0.2, 0))
    assert discordance_of(McNemar(0, 0, 98, 1.0)) == 0.01


def test_intervals_of_a_mean_and_of_a_gap_cover_as_often_as_they_say():
    rng, mean, gap = np.random.default_rng(2), 0, 0
    for trial in range(300):
        a, b = rng.normal(0.3, 1, 50), rng.exponential(1, 80)
        low, high = mean_interval(a, n_resamples=400, seed=trial)
        mean += low <= 0.3 <= high
        low, high = gap_interval(a, b, n_resamples=400, seed=trial)
        gap += low <= 0.3 - 1 <= high
    assert stats.binomtest(mean, 300, 0.94).pvalue > 0.01 and stats.binomtest(gap, 300, 0.94).pvalue > 0.01
    assert math.isnan(mean_interval(np.ones(1))[0])
    assert mean_interval(np.zeros(9), n_resamples=50) == (0, 0)


@pytest.mark.parametrize(("gain", "loss"), [(0.05, 0.0), (0.08, 0.03), (0.15, 0.10), (0.30, 0.25)])
def test_two_arms_that_differ_by_the_margin_are_seldom_called_equivalent(gain, loss):
    rng, called = np.random.default_rng(3), 0
    for _ in range(400):
        kind = rng.choice([1.0, -1.0, 0.0], size=100, p=[gain, loss, 1 - gain - loss])
        called += equivalence_p(kind, 0.05) <= 0.05
    assert called / 400 < 0.08


def test_equal_arms_are_equivalent_once_there_are_enough_prompts():
    # .95^58 = .051, .95^59 = .048: nothing differed on 59 prompts, so fewer than 5 % differ
    assert equivalence_p(np.zeros(58), 0.05) > 0.05 > equivalence_p(np.zeros(59), 0.05)
    assert equivalence_p(np.zeros(59), 0.05) == pytest.approx(0.95**59)
    balanced = np.array([1.0, -1.0] * 20 + [0.0] * 1960)
    above = stats.ttest_1samp(balanced, -0.05, alternative="greater").pvalue
    assert equivalence_p(balanced, 0.05) == pytest.approx(above)
    assert equivalence_p(np.ones(50), 0.05) == 1
    assert math.isnan(equivalence_p(np.zeros(1), 0.05))
    with pytest.raises(ValueError, match="between 0 and 1"):
        equivalence_p(np.array([0, 3.0]), 0.05)


def test_the_poisson_interval_is_the_printed_table_and_covers():
    # Garwood's table, 95 %
    for count, low, high in [(0, 0, 3.689), (1, 0.0253, 5.572), (10, 4.795, 18.39), (50, 37.11, 65.92)]:
        assert poisson_interval(count) == pytest.approx((low, high), rel=1e-3)
    for mean in (0.5, 4, 30):
        covered = [low <= mean <= high for low, high in map(poisson_interval, range(200))]
        assert (stats.poisson.pmf(range(200), mean) * covered).sum() >= 0.95


def test_the_ratio_of_counts_covers_and_has_its_edges():
    rng, covered = np.random.default_rng(4), 0
    for a, b in rng.poisson((12, 4), (200, 2)).tolist():
        _, low, high = ratio_of_counts(a, b)
        covered += low <= 3 <= high
    assert covered / 200 >= 0.93
    assert ratio_of_counts(4, 0)[0] == math.inf == ratio_of_counts(4, 0)[2]
    assert ratio_of_counts(0, 5)[0] == 0 and math.isnan(ratio_of_counts(0, 0)[0])


def test_holm_is_the_textbook_example_and_leaves_what_was_not_asked():
    # .01·4, .03·3, .04·2, .005·... : sorted .005 .01 .03 .04 → .02 .03 .06 .06
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    adjusted = holm([0.04, math.nan, 0.5])
    assert adjusted[0] == pytest.approx(0.08) and math.isnan(adjusted[1]) and adjusted[2] == 0.5
    assert holm([]) == []


def test_the_rank_among_random_sets_is_uniform_where_nothing_is_special():
    rng = np.random.default_rng(5)
    found = [p_value(values[0], values[1:].tolist()) for values in rng.normal(size=(200, 20))]
    # one of 20 ranks each: p <= .05 in one of 20, whatever the shape of the effects
    assert stats.kstest(np.array(found) - rng.random(200) / 20, "uniform").pvalue > 0.01
    assert min(found) == 1 / 20


def test_signed_ranks_and_effect_sizes_are_scipys_and_numpys():
    x = np.array([0.3, -0.1, 0.0, 0.7, 0.2, 0.5])
    assert signed_rank_p(x) == stats.wilcoxon(x[x != 0]).pvalue
    assert signed_rank_p(np.zeros(4)) == 1 and math.isnan(signed_rank_p(np.zeros(0)))
    assert cohens_dz(x) == pytest.approx(x.mean() / x.std(ddof=1))
    assert math.isnan(cohens_dz(np.ones(3)))


def test_correlations_are_scipys_and_nan_where_nothing_varies():
    rng = np.random.default_rng(6)
    x = rng.exponential(size=30)
    y = x + rng.normal(size=30)
    assert correlation(x, y) == pytest.approx(stats.pearsonr(x, y).statistic)
    assert rank_correlation(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    for value in (0.0, 0.1, 1e9):
        assert math.isnan(correlation(x, np.full(30, value)))
        assert math.isnan(partial_correlation(x, np.full(30, value), x))
    assert correlation(x, 3 * x + 1) == pytest.approx(1)


def test_pairs_of_one_conversation_are_drawn_together_and_count_as_what_they_tell():
    """Four probes of each of 25 conversations, all alike: no more is known than of 25, and only clusters say so."""
    rng, owner = np.random.default_rng(0), np.repeat(np.arange(25), 4)
    hits = {"together": 0, "apart": 0}
    for trial in range(150):
        x, y = rng.multivariate_normal([0, 0], [[1, 0.5], [0.5, 1]], 25).T[:, owner]
        for name, clusters in (("together", owner), ("apart", None)):
            low, high = correlation_interval(x, y, clusters=clusters, n_resamples=300, seed=trial)
            hits[name] += low <= 0.5 <= high
    assert hits["together"] >= 0.87 * 150 and hits["apart"] < 0.75 * 150
    assert math.isnan(correlation_interval(x, y, clusters=np.zeros(100, dtype=int))[0])


def test_the_correlation_interval_covers_the_truth():
    rng, covered = np.random.default_rng(7), 0
    for trial in range(200):
        x, y = rng.multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], size=60).T
        low, high = correlation_interval(x, y, n_resamples=300, seed=trial)
        covered += low <= 0.6 <= high
    assert stats.binomtest(covered, 200, 0.94).pvalue > 0.01
    assert math.isnan(correlation_interval(np.ones(9), np.arange(9.0))[0])


def test_what_two_effects_owe_to_a_common_size_is_no_partial_correlation():
    rng = np.random.default_rng(8)
    f = rng.exponential(size=4000)
    u, v = rng.uniform(0.5, 1.5, (2, 4000))
    assert correlation(f**2 * u, f**2 * v) > 0.8
    assert abs(partial_correlation(f**2 * u, f**2 * v, f)) < 0.15
    # on well-behaved data it is what scipy gives on the residuals of a polynomial fit
    x, y = f + rng.normal(size=(2, 4000))
    left = [values - np.polynomial.Polynomial.fit(f, values, 2)(f) for values in (x, y)]
    assert partial_correlation(x, y, f) == pytest.approx(stats.pearsonr(*left).statistic)
    assert math.isnan(partial_correlation(f**2, f, f))  # nothing is left
