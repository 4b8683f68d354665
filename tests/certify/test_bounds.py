"""Confidence bounds against exact binomial sums, statsmodels and the rational oracle."""

import warnings
from fractions import Fraction

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from hf_certify import reference
from hf_certify.bounds import (
    bonferroni,
    clopper_pearson_lower,
    clopper_pearson_upper,
    cohen,
    cpm,
    max_upper,
    minimum_draws,
    probability_bounds,
    require_certifiable,
)
from hf_certify.certificate import Certificate
from hf_certify.partition import rank_classes
from hf_certify.radius import multi_radius

RULES = ("cohen", "bonferroni", "cpm", "max_upper")


@pytest.mark.parametrize("n", [1, 7, 60])
@pytest.mark.parametrize("alpha", [0.001, 0.05, 0.5])
def test_lower_bound_covers_for_every_p(n, alpha):
    """Exact, not simulated: the miss chance at p is a finite binomial sum, and no p may exceed alpha."""
    bound = clopper_pearson_lower(np.arange(n + 1), n, alpha)
    # misses peak just below each bound
    p = np.unique(np.concatenate([np.linspace(0, 1, 501), np.nextafter(bound, 0)]))
    miss = np.array([stats.binom.pmf(np.flatnonzero(bound > x), n, x).sum() for x in p])
    assert miss.max() <= alpha * (1 + 1e-9)
    # and it is not wastefully low either
    assert miss.max() > 0.9 * alpha


@pytest.mark.parametrize("n", [1, 7, 60])
@pytest.mark.parametrize("alpha", [0.001, 0.05, 0.5])
def test_upper_bound_covers_for_every_p(n, alpha):
    """Exact, not simulated: the miss chance at p is a finite binomial sum, and no p may exceed alpha."""
    bound = clopper_pearson_upper(np.arange(n + 1), n, alpha)
    p = np.unique(np.concatenate([np.linspace(0, 1, 501), np.nextafter(bound, 1)]))
    miss = np.array([stats.binom.pmf(np.flatnonzero(bound < x), n, x).sum() for x in p])
    assert miss.max() <= alpha * (1 + 1e-9)
    assert miss.max() > 0.9 * alpha


@pytest.mark.parametrize("n", [1, 10, 1000, 100_000])
def test_bounds_agree_with_statsmodels(n):
    """Oracle: statsmodels' two-sided interval at 2 * alpha, whose sides are the one-sided bounds at alpha."""
    with warnings.catch_warnings():
        # third-party import: its own deprecations are not ours
        warnings.simplefilter("ignore")
        from statsmodels.stats.proportion import proportion_confint
    successes = np.unique(np.linspace(0, n, 41).astype(int))
    lower, upper = proportion_confint(successes, n, alpha=2 * 0.001, method="beta")
    np.testing.assert_allclose(clopper_pearson_lower(successes, n, 0.001), lower, rtol=1e-9)
    np.testing.assert_allclose(clopper_pearson_upper(successes, n, 0.001), upper, rtol=1e-9)


@given(st.data())
def test_bounds_lie_just_outside_the_exact_ones(data):
    """Oracle: bisection in exact rational arithmetic; the fast bounds are rounded outward, and hardly."""
    n = data.draw(st.integers(1, 40))
    k = data.draw(st.integers(0, n))
    alpha = data.draw(st.sampled_from([0.3, 0.05, 0.001, 1e-6]))
    lower, upper = float(clopper_pearson_lower(k, n, alpha)), float(clopper_pearson_upper(k, n, alpha))
    # the oracle's own resolution is 2**-50
    assert lower <= reference.exact_lower(k, n, Fraction(alpha)) + Fraction(1, 2**49)
    assert upper >= reference.exact_upper(k, n, Fraction(alpha)) - Fraction(1, 2**49)
    assert lower == pytest.approx(float(reference.exact_lower(k, n, Fraction(alpha))), rel=1e-10, abs=1e-14)
    assert upper == pytest.approx(float(reference.exact_upper(k, n, Fraction(alpha))), rel=1e-10)


def test_bounds_at_no_and_at_all_successes_are_closed_form():
    """Oracle: alpha = p**n has the root alpha**(1/n)."""
    for n in (1, 50, 10**6):
        assert float(clopper_pearson_lower(0, n, 0.01)) == 0.0
        assert float(clopper_pearson_upper(n, n, 0.01)) == 1.0
        assert float(clopper_pearson_lower(n, n, 0.01)) == pytest.approx(0.01 ** (1 / n), rel=1e-11)
        assert float(clopper_pearson_upper(0, n, 0.01)) == pytest.approx(-np.expm1(np.log(0.01) / n), rel=1e-11)


@given(st.lists(st.integers(0, 400), min_size=3, max_size=7).filter(sum), st.integers(0, 2))
def test_max_upper_is_never_looser_than_bonferroni_or_cpm(estimation, top):
    """On equal counts with three or more classes: a larger share of alpha for the same two counts."""
    votes = np.array(estimation)
    lower, upper = max_upper(votes, top, 0.001)
    others = [bonferroni(votes, top, 0.001)]
    selection = np.zeros(len(votes), dtype=int)
    selection[top] = 1
    others.append(cpm(votes, selection, 0.001))
    for other_lower, other_upper in others:
        assert lower >= other_lower
        assert upper <= other_upper


def test_max_upper_never_has_a_smaller_radius_than_cpm_or_bonferroni():
    """On 10,000 random pairs of samples, with 2 to 1,000 classes, some diffuse, some with ties."""
    random = np.random.default_rng(0)
    for _ in range(10_000):
        classes = int(random.choice([2, 3, 10, 1000]))
        p = random.dirichlet(np.full(classes, random.choice([0.05, 1.0])))
        selection, estimation = random.multinomial(int(random.integers(1, 100)), p), random.multinomial(1000, p)
        top = int(rank_classes(selection)[0])
        ours, *others = (
            multi_radius(1.0, *bounds)
            for bounds in (
                max_upper(estimation, top, 0.001),
                cpm(estimation, selection, 0.001),
                bonferroni(estimation, top, 0.001),
            )
        )
        assert ours >= max(others)


@pytest.mark.parametrize("n", [100, 100_000])
@pytest.mark.parametrize("alpha", [0.001, 1e-6])
def test_bounds_agree_with_fifty_digits(n, alpha):
    """Oracle: the binomial tail summed with 50 digits, alpha at the exact bound; its slope gives the error."""

    def tail_and_slope(k, p):
        """P(X >= k), and its derivative."""
        term = mpmath.binomial(n, k) * p**k * (1 - p) ** (n - k)
        slope, tail, j = term * k / p, mpmath.mpf(0), k
        while term > mpmath.mpf(10) ** -45:
            tail, term, j = tail + term, term * (n - j) / (j + 1) * p / (1 - p), j + 1
        return tail, slope

    with mpmath.workdps(50):
        for k in (1, n // 7, n // 2, n - 1):
            bound = mpmath.mpf(float(clopper_pearson_lower(k, n, alpha)))
            tail, slope = tail_and_slope(k, bound)
            assert -1e-11 < (tail - alpha) / slope / bound <= 0
            # P(X <= k) is alpha at the upper bound, and is counted from the other side
            bound = mpmath.mpf(float(clopper_pearson_upper(k, n, alpha)))
            tail, slope = tail_and_slope(n - k, 1 - bound)
            assert -1e-11 < (tail - alpha) / slope / bound <= 0


@given(st.permutations(range(5)))
def test_relabelling_the_classes_relabels_the_bounds(order):
    """Without ties in the selection sample no rule may depend on the order of the classes."""
    selection, estimation = np.array([50, 20, 15, 9, 6]), np.array([480, 250, 140, 70, 60])
    permutation = np.array(order)
    for interval in RULES:
        margin = "mono" if interval == "cohen" else "multi"
        expected = probability_bounds(selection, estimation, alpha=0.01, interval=interval, margin=margin)
        permuted = probability_bounds(
            selection[permutation], estimation[permutation], alpha=0.01, interval=interval, margin=margin
        )
        assert permuted == expected


def test_mono_gives_the_whole_of_alpha_to_one_bound_under_every_rule():
    selection, estimation = np.array([8, 1, 1]), np.array([700, 200, 100])
    for interval in RULES:
        bounds = probability_bounds(selection, estimation, alpha=0.01, interval=interval, margin="mono")
        assert bounds == cohen(estimation, 0, 0.01)


@pytest.mark.parametrize("interval", RULES)
@pytest.mark.parametrize("num_classes", [2, 3, 10])
def test_minimum_draws_is_where_unanimous_votes_begin_to_certify(interval, num_classes):
    """Oracle: the radius itself, with n and with n - 1 unanimous votes."""
    margin = "mono" if interval == "cohen" else "multi"
    least = minimum_draws(0.001, interval=interval, margin=margin, num_classes=num_classes)

    def radius(n: int) -> float:
        votes = [n] + [0] * (num_classes - 1)
        return Certificate.from_counts(votes, votes, sigma=1.0, interval=interval).radius

    assert radius(least) > 0
    assert radius(least - 1) == 0


def test_too_few_draws_to_certify_anything_are_refused_with_the_number_needed():
    with pytest.raises(
        ValueError, match=r"n must be at least 11 for interval='max_upper', alpha=0.001 and 10 classes"
    ):
        require_certifiable(0.001, 10, interval="max_upper", margin="multi", num_classes=10)
    require_certifiable(0.001, 11, interval="max_upper", margin="multi", num_classes=10)


@pytest.mark.parametrize("bound", [clopper_pearson_lower, clopper_pearson_upper])
@pytest.mark.parametrize(("k", "n", "alpha"), [(0, 0, 0.1), (3, 2, 0.1), (-1, 2, 0.1), (1, 2, 0.0), (1, 2, 1.0)])
def test_impossible_counts_and_levels_are_refused(bound, k, n, alpha):
    with pytest.raises(ValueError, match="must be in"):
        bound(k, n, alpha)


@pytest.mark.parametrize("alpha", [1e-100, 1e-104])
@pytest.mark.parametrize("successes", [400, 990, 1000])
def test_bounds_at_the_least_alpha_are_sound_and_tight(successes, alpha):
    """Oracle: the binomial tail at the bound, summed with 60 digits; 1e-104 is a share of the least alpha."""
    with mpmath.workdps(60):
        lower = mpmath.mpf(float(clopper_pearson_lower(successes, 1000, alpha)))
        upper = mpmath.mpf(float(clopper_pearson_upper(1000 - successes, 1000, alpha)))
        for p in (lower, 1 - upper):
            tail = sum(mpmath.binomial(1000, k) * p**k * (1 - p) ** (1000 - k) for k in range(successes, 1001))
            assert 0.999 * alpha <= tail <= alpha


def test_an_alpha_whose_bounds_cannot_be_computed_is_refused():
    with pytest.raises(ValueError, match="alpha must be at least 1e-100, got 1e-200"):
        minimum_draws(1e-200, interval="cohen", margin="mono", num_classes=2)
    with pytest.raises(ValueError, match="alpha must be at least 1e-150, got 1e-200"):
        clopper_pearson_lower(400, 1000, 1e-200)
