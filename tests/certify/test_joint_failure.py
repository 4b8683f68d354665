"""The failure probability of whole certificates, by enumerating every outcome of both samples."""

import itertools

import numpy as np
import pytest
from scipy import special, stats

from hf_certify.bounds import clopper_pearson_lower, clopper_pearson_upper
from hf_certify.certificate import Certificate

SELECTION_DRAWS = 6


def outcomes(n: int, num_classes: int) -> np.ndarray:
    """Return all vote vectors `[M, K]` of ``n`` draws."""
    bars = itertools.combinations(range(n + num_classes - 1), num_classes - 1)
    return np.array([np.diff((-1, *bar, n + num_classes - 1)) - 1 for bar in bars])


def probabilities(votes: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Return the multinomial probability `[P, M]` of each outcome under each row of ``p``."""
    log_ways = special.gammaln(votes.sum(1) + 1) - special.gammaln(votes + 1).sum(1)
    return np.exp(log_ways + special.xlogy(votes[None], p[:, None]).sum(-1))


def simplex_grid(num_classes: int, steps: int) -> np.ndarray:
    """Return class probabilities `[P, K]`: a grid, and points around the top class at even odds with the runner-up."""
    grid = outcomes(steps, num_classes) / steps
    rest = outcomes(4, num_classes - 2) / 4
    near = [
        [a, b, *((1 - a - b) * share)]
        for a in np.linspace(0.3, 0.65, 15)
        for b in (a, a - 1e-4)
        for share in rest
        if a + b <= 1
    ]
    return np.concatenate([grid, near])


def true_radii(p: np.ndarray) -> np.ndarray:
    """Return the largest l2 radius `[P, K]` that these probabilities allow for each class at sigma 1, 0 for losers."""
    runner_up = np.stack([np.delete(p, label, axis=1).max(1) for label in range(p.shape[1])], axis=1)
    with np.errstate(invalid="ignore"):
        return np.where(p > runner_up, 0.5 * (stats.norm.ppf(p) - stats.norm.ppf(runner_up)), 0.0)


def pilot_runner_up(selection: np.ndarray, estimation: np.ndarray, alpha: float) -> tuple[int, float]:
    """Return the claim of an unsound rule: the upper bound is that of the runner-up of the selection sample."""
    top, second = np.argsort(-selection, kind="stable")[:2]
    lower = clopper_pearson_lower(estimation[top], estimation.sum(), alpha / 2)
    upper = min(clopper_pearson_upper(estimation[second], estimation.sum(), alpha / 2), 1 - lower)
    return int(top), float(max(0.0, 0.5 * (stats.norm.ppf(lower) - stats.norm.ppf(upper))))


def failure_probabilities(claim, p: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the chance of a false certificate `[P]`, overall and given the worst outcome of the selection sample."""
    selections, estimations = outcomes(SELECTION_DRAWS, p.shape[1]), outcomes(n, p.shape[1])
    weight, chance, truth = probabilities(selections, p), probabilities(estimations, p), true_radii(p)
    overall, worst = np.zeros(len(p)), np.zeros(len(p))
    for number, selection in enumerate(selections):
        claims = [claim(selection, estimation) for estimation in estimations]
        label = claims[0][0]
        radius = np.array([claimed for _, claimed in claims])
        false = (radius[None] > truth[:, label, None] * (1 + 1e-12)) & (radius[None] > 0)
        failing = (chance * false).sum(1)
        overall += weight[:, number] * failing
        worst = np.maximum(worst, failing)
    return overall, worst


@pytest.mark.parametrize("interval", ["cohen", "bonferroni", "cpm", "max_upper"])
@pytest.mark.parametrize(
    ("num_classes", "n", "steps", "alpha"), [(3, 24, 24, 0.05), (3, 24, 24, 0.002), (4, 11, 12, 0.05)]
)
def test_no_class_probabilities_make_certificates_fail_more_often_than_alpha(interval, num_classes, n, steps, alpha):
    """Exact: multinomial sums over every outcome, even given the least favourable selection sample."""

    def claim(selection: np.ndarray, estimation: np.ndarray) -> tuple[int, float]:
        key = (tuple(selection), tuple(estimation))
        certificate = Certificate.from_counts(*key, sigma=1.0, alpha=alpha, interval=interval)
        return int(np.argmax(selection)), certificate.radius

    overall, worst = failure_probabilities(claim, simplex_grid(num_classes, steps), n)
    assert worst.max() <= alpha
    # the rules do fail sometimes: the check is not empty
    assert overall.max() > alpha / 100


@pytest.mark.parametrize("n", [40, 80, 120])
def test_max_upper_keeps_alpha_for_every_sample_size(n):
    """Exact trinomial enumeration at n = 40, 80, 120. Of the selection sample the rule uses the first class alone."""
    alpha, p = 0.01, simplex_grid(3, 24)
    estimations, truth = outcomes(n, 3), true_radii(p)
    chance = probabilities(estimations, p)
    for top in range(3):
        selection = np.eye(3, dtype=int)[top].tolist()
        radius = np.array(
            [Certificate.from_counts(selection, votes, sigma=1.0, alpha=alpha).radius for votes in estimations]
        )
        false = (radius[None] > truth[:, top, None] * (1 + 1e-12)) & (radius[None] > 0)
        failing = (chance * false).sum(1)
        assert alpha / 100 < failing.max() <= alpha


def test_a_runner_up_taken_from_the_selection_sample_is_caught():
    """Negative control: the same enumeration must refuse a rule that is known to be unsound."""
    alpha = 0.05
    overall, _ = failure_probabilities(lambda s, e: pilot_runner_up(s, e, alpha), simplex_grid(3, 24), 24)
    assert overall.max() > 2 * alpha
