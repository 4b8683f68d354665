"""The smoothed classifier against classifiers whose smoothed versions are known in closed form."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from hf_certify import (
    InvalidLogitsError,
    SmoothedClassifier,
    UnsupportedModelError,
)
from hf_certify.bounds import clopper_pearson_lower
from hf_certify.noise import Stage, draw_noise
from tests.certify.toy_models import Slabs, half_space

RULES = ("cohen", "bonferroni", "cpm", "max_upper")


@pytest.mark.parametrize("interval", RULES)
@pytest.mark.parametrize("scale", [0.05, 0.2, 0.4])
def test_certified_radius_approaches_the_distance_to_a_half_space_from_below(interval, scale):
    """Oracle: the distance to the plane is the exact radius. A claim above it has chance .001; the seed is fixed."""
    model = half_space()
    x = scale * torch.ones(12)
    smoothed = SmoothedClassifier(model, sigma=0.5, num_classes=2, seed=11)
    certificate = smoothed.certify(x, n=100_000, interval=interval)
    assert certificate.label == 0
    assert certificate.radius <= model.distance(x)
    assert certificate.radius > 0.93 * model.distance(x) - 0.01


@pytest.mark.parametrize("interval", RULES)
def test_certified_radius_stays_below_the_exact_one_with_three_classes(interval):
    """Oracle: differences of Phi give the class probabilities of slabs; rules with a runner-up also work below 1/2."""
    model = Slabs([-0.4, 0.35]).eval()
    smoothed = SmoothedClassifier(model, sigma=0.6, num_classes=3, seed=5)
    certificate = smoothed.certify(torch.zeros(1), n=50_000, interval=interval)
    edges = stats.norm.cdf([-0.4 / 0.6, 0.35 / 0.6])
    top, runner_up = edges[1] - edges[0], 1 - edges[1]
    assert top < 0.5
    exact = 0.3 * (stats.norm.ppf(top) - stats.norm.ppf(runner_up))
    if interval == "cohen":
        assert certificate.abstained
    else:
        assert 0.85 * exact < certificate.radius <= exact
        assert certificate.label == 1


def mean_and_deviation_of_the_radius(p, n, alpha):
    """Of the mono rule, in units of sigma, by a finite sum over all numbers of votes."""
    # the rest has a chance below 1e-15
    spread = 9 * np.sqrt(n * p * (1 - p)) + 50
    votes = np.arange(max(0, int(n * p - spread)), min(n, int(n * p + spread)) + 1)
    chance = stats.binom.pmf(votes, n, p)
    bound = clopper_pearson_lower(votes, n, alpha)
    radius = np.where(bound > 0.5, stats.norm.ppf(np.maximum(bound, 0.5)), 0.0)
    mean = (chance * radius).sum()
    return mean, np.sqrt((chance * (radius - mean) ** 2).sum())


@pytest.mark.slow
@pytest.mark.parametrize("true_radius", [0.25, 0.5, 1.0, 2.0, 3.0, 3.5])
def test_the_mean_radius_of_1000_runs_is_that_of_exact_binomial_sums(true_radius):
    """Oracle: the votes of a half-space are binomial with p = Phi(R / sigma). Fails by chance once in 15,000."""
    n, runs = 10_000, 1000
    smoothed = SmoothedClassifier(half_space(1), sigma=1.0, num_classes=2, seed=3, batch_size=5000)
    # the normal of one coordinate is -1
    x = torch.full((1,), -true_radius)
    radii = [smoothed.certify(x, n0=500, n=n, interval="cohen").radius for _ in range(runs)]
    mean, deviation = mean_and_deviation_of_the_radius(stats.norm.cdf(true_radius), n, 0.001)
    assert abs(np.mean(radii) - mean) <= 4 * deviation / runs**0.5 + 1e-8


def test_with_100_000_draws_no_more_than_three_percent_of_a_radius_is_lost():
    """Exact, between half a sigma and three."""
    for true_radius in np.linspace(0.5, 3.0, 26):
        mean, _ = mean_and_deviation_of_the_radius(stats.norm.cdf(true_radius), 100_000, 0.001)
        assert 0.97 * true_radius <= mean < true_radius


def test_certificate_carries_its_settings_and_verifies():
    smoothed = SmoothedClassifier(half_space(), sigma=0.5, num_classes=2, seed=1)
    certificate = smoothed.certify(torch.ones(12), n0=30, n=400, alpha=0.01, interval="cpm", source="x.png")
    certificate.verify()
    assert (certificate.n0, certificate.n, certificate.alpha, certificate.sigma) == (30, 400, 0.01, 0.5)
    assert (certificate.interval, certificate.margin, certificate.source) == ("cpm", "multi", "x.png")
    assert sum(certificate.selection) == 30
    assert sum(certificate.estimation) == 400


def test_the_seed_and_the_index_fix_the_votes_and_the_batch_size_does_not_change_them():
    x = 0.1 * torch.ones(12)

    def certify(seed: int, index: int, batch_size: int) -> tuple[int, ...]:
        smoothed = SmoothedClassifier(half_space(), sigma=0.5, num_classes=2, seed=seed, batch_size=batch_size)
        return smoothed.certify(x, n=2000, index=index).estimation

    assert certify(1, 0, 64) == certify(1, 0, 17)
    assert len({certify(1, 0, 64), certify(1, 1, 64), certify(2, 0, 64)}) == 3


def test_selection_and_estimation_votes_come_from_their_own_noise():
    """Oracle: votes on the noise of each stage, counted by hand."""
    x = 0.1 * torch.ones(12)
    certificate = SmoothedClassifier(half_space(), sigma=0.5, num_classes=2, seed=1).certify(x, n0=300, n=300, index=2)
    for stage, votes in ((Stage.SELECTION, certificate.selection), (Stage.ESTIMATION, certificate.estimation)):
        noise = torch.cat([chunk.clone() for chunk in draw_noise((12,), 300, seed=1, index=2, stage=stage)])
        expected = half_space()(x + 0.5 * noise).argmax(1).bincount(minlength=2).tolist()
        assert list(votes) == expected
    assert certificate.selection != certificate.estimation


def test_without_an_index_every_call_has_its_own_noise():
    x = 0.1 * torch.ones(12)
    smoothed = SmoothedClassifier(half_space(), sigma=0.5, num_classes=2, seed=1)
    numbers = [smoothed.certify(x, n=50, index=index).index for index in (None, None, 7, None)]
    assert numbers == [0, 1, 7, 8]


def test_an_unseeded_classifier_records_a_seed_that_repeats_it():
    x = 0.1 * torch.ones(12)
    first = SmoothedClassifier(half_space(), sigma=0.5, num_classes=2)
    again = SmoothedClassifier(half_space(), sigma=0.5, num_classes=2, seed=first.seed)
    assert first.certify(x, n=500) == again.certify(x, n=500)


def test_the_model_is_left_bit_identical():
    model = half_space()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    SmoothedClassifier(model, sigma=0.5, num_classes=2, seed=1).certify(torch.ones(12), n=50)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not model.training


def test_predict_returns_the_clear_winner():
    prediction = SmoothedClassifier(half_space(), sigma=0.5, num_classes=2, seed=1).predict(torch.ones(12), n=200)
    assert prediction.label == 0
    assert sum(prediction.counts) == 200


def test_predict_abstains_on_the_decision_boundary():
    prediction = SmoothedClassifier(half_space(), sigma=0.5, num_classes=2, seed=1).predict(torch.zeros(12), n=2000)
    assert prediction.label is None
    assert prediction.p_value > 0.001


def test_predict_tests_the_two_leaders_exactly():
    """Oracle: scipy's two-sided binomial test on the two largest counts."""
    smoothed = SmoothedClassifier(Slabs([-0.4, 0.35]).eval(), sigma=0.6, num_classes=3, seed=5)
    for n in (5, 60, 400):
        prediction = smoothed.predict(torch.zeros(1), n=n, alpha=0.05)
        second, first = sorted(prediction.counts)[1:]
        p_value = stats.binomtest(first, first + second).pvalue
        assert prediction.p_value == pytest.approx(p_value, rel=1e-9)
        assert (prediction.label is None) == (p_value > 0.05)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"sigma": 0.0}, ValueError, "sigma must be finite and > 0, got 0.0"),
        ({"sigma": float("inf")}, ValueError, "sigma must be finite and > 0, got inf"),
        ({"sigma": "0.5"}, TypeError, "sigma must be a number, got '0.5' of type str"),
        ({"num_classes": 2.0}, TypeError, "num_classes must be an int >= 2, got 2.0 of type float"),
        ({"num_classes": 1}, UnsupportedModelError, "at least 2 classes, got num_classes=1"),
        ({"batch_size": 0}, ValueError, "batch_size must be an int >= 1 or 'auto', got 0"),
        ({"batch_size": "large"}, TypeError, "batch_size must be an int >= 1 or 'auto', got 'large'"),
        ({"seed": -1}, ValueError, r"seed must be in \[0, 2\*\*128\), got -1"),
        ({"model": torch.relu}, TypeError, "model must be a torch.nn.Module"),
        ({"model": nn.Linear(2, 2)}, UnsupportedModelError, "must be in evaluation mode"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(settings, error, message):
    arguments = {"model": half_space(), "sigma": 0.5, "num_classes": 2} | settings
    model = arguments.pop("model")
    with pytest.raises(error, match=message):
        SmoothedClassifier(model, **arguments)


@pytest.mark.parametrize(
    ("x", "settings", "error", "message"),
    [
        (torch.ones(12).double(), {}, TypeError, "x must be a float32 tensor, got torch.float64"),
        ([1.0] * 12, {}, TypeError, "x must be a float32 tensor, got list"),
        (torch.full((12,), float("nan")), {}, ValueError, "be finite, got a tensor of shape"),
        (torch.ones(0), {}, ValueError, "at least one value"),
        (torch.ones(12), {"alpha": 1.0}, ValueError, r"alpha must be in \(0, 1\), got 1.0"),
        (torch.ones(12), {"n": 10}, ValueError, "n must be at least 11"),
        (torch.ones(12), {"n": 1e4}, TypeError, "n must be an int >= 1, got 10000.0 of type float"),
        (torch.ones(12), {"n0": 0}, ValueError, "n0 must be an int >= 1, got 0"),
        (torch.ones(12), {"interval": "wald"}, ValueError, "interval must be one of 'cohen', .* got 'wald'"),
        (torch.ones(12), {"margin": "best"}, ValueError, "margin must be one of 'auto', 'mono', 'multi', got 'best'"),
        (torch.ones(12), {"index": -1}, ValueError, "index must be an int >= 0, got -1"),
    ],
)
def test_inputs_that_cannot_be_certified_are_refused_before_any_draw(x, settings, error, message):
    smoothed = SmoothedClassifier(half_space(), sigma=0.5, num_classes=2, seed=1)
    with pytest.raises(error, match=message):
        smoothed.certify(x, **({"n": 20} | settings), on_draws=pytest.fail)


def test_the_input_whose_logits_are_not_finite_is_named():
    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[:, :2] / 0.0

    smoothed = SmoothedClassifier(Broken().eval(), sigma=0.5, num_classes=2, seed=1)
    with pytest.raises(InvalidLogitsError, match="Input 4: Logits must be finite"):
        smoothed.certify(torch.ones(12), n=20, index=4)


@pytest.mark.parametrize(
    ("value", "sigma", "message"),
    [
        (1e8, 0.5, r"sigma must be at least 2\.441e\+04 for values up to 1e\+08, got 0\.5: float32 would round"),
        (0.5, 1e-9, r"sigma must be at least 0\.0002441 for values up to 0\.5, got 1e-09: float32 would round"),
        (0.5, 1e-7, "rescale x"),
        (-1e8, 0.5, "rescale x"),
        (2e38, 0.5, r"x must hold values up to 1e\+38, got 2e\+38"),
    ],
)
def test_noise_that_float32_would_round_away_is_refused(value, sigma, message):
    smoothed = SmoothedClassifier(half_space(), sigma=sigma, num_classes=2, seed=1)
    for call in (smoothed.certify, smoothed.predict):
        with pytest.raises(ValueError, match=message):
            call(torch.full((12,), value), n=20)


@pytest.mark.parametrize("largest", [0.5, 1.0, 1e8])
def test_at_the_least_sigma_votes_near_a_float32_value_are_unbiased(largest):
    """Oracle: half of the noise lies above 0. At 100,000 draws, 6 standard deviations are 0.0095."""
    sigma = 2**-12 * max(1.0, largest)
    model = Slabs([largest]).eval()
    votes = SmoothedClassifier(model, sigma=sigma, num_classes=2, seed=1).predict(torch.tensor([largest]), n=100_000)
    assert votes.counts[0] / 100_000 == pytest.approx(0.5, abs=0.0095)


def test_a_sigma_outside_float32_is_refused():
    for sigma in (1e39, 10**400):
        with pytest.raises(ValueError, match=r"sigma must be at most 1e\+37"):
            SmoothedClassifier(half_space(), sigma=sigma, num_classes=2)
