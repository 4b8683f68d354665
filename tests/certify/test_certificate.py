"""One certificate: what follows from votes, and what does not."""

import dataclasses
import json
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_certify import Certificate, VerificationError, reference

RULES = ("cohen", "bonferroni", "cpm", "max_upper")


def example(**settings: object) -> Certificate:
    return Certificate.from_counts([80, 15, 5, 0], [800, 120, 60, 20], **({"sigma": 0.5} | settings))


@given(st.data())
def test_certificate_agrees_with_exact_arithmetic_and_never_exceeds_it(data):
    """Oracle: rational Clopper-Pearson bounds by bisection, partition and quantile from the standard library."""
    classes = data.draw(st.integers(2, 5))
    votes = st.lists(st.integers(0, 9), min_size=classes, max_size=classes).filter(any)
    selection, estimation = data.draw(votes), data.draw(votes)
    # a lead for the selected class, without which nearly all examples would abstain
    estimation[selection.index(max(selection))] += data.draw(st.integers(0, 60))
    interval, alpha = data.draw(st.sampled_from(RULES)), data.draw(st.sampled_from([0.3, 0.05, 0.001]))
    certificate = Certificate.from_counts(selection, estimation, sigma=0.5, alpha=alpha, interval=interval)
    label, radius = reference.certified_radius(
        selection, estimation, sigma=0.5, alpha=Fraction(alpha), interval=interval
    )
    assert certificate.label == (None if certificate.radius == 0 else label)
    assert certificate.radius <= radius + 1e-13
    assert certificate.radius == pytest.approx(radius, rel=1e-8, abs=1e-10)


@pytest.mark.parametrize(("interval", "bounds"), [("cohen", 1), ("max_upper", 2), ("cpm", 3), ("bonferroni", 4)])
def test_every_bound_gets_its_share_of_alpha(interval, bounds):
    """Oracle: exact Clopper-Pearson bounds at alpha / m, where the runner-up decides rather than the remainder."""
    votes = [40, 20, 15, 5]
    certificate = Certificate.from_counts(votes, votes, sigma=0.5, alpha=0.05, interval=interval)
    share = Fraction(0.05) / bounds
    lower, upper = reference.exact_lower(40, 80, share), reference.exact_upper(20, 80, share)
    assert certificate.pa_lower == pytest.approx(float(lower), rel=1e-10)
    assert certificate.pb_upper == pytest.approx(float(1 - lower if interval == "cohen" else upper), rel=1e-10)


def test_votes_that_lead_nowhere_abstain():
    certificate = Certificate.from_counts([6, 4], [510, 490], sigma=0.5)
    assert certificate.abstained
    assert certificate.radius == 0
    assert certificate.label is None


def test_the_class_comes_from_the_selection_sample_even_when_the_estimation_sample_disagrees():
    assert Certificate.from_counts([6, 4], [10, 990], sigma=0.5).abstained


@pytest.mark.parametrize("interval", RULES)
def test_another_rule_on_the_same_votes_gives_what_it_would_have_given_at_first(interval):
    assert example(interval="cohen").with_interval(interval) == example(interval=interval)


@pytest.mark.parametrize("interval", RULES)
def test_a_certificate_survives_json_and_verifies(interval):
    certificate = example(interval=interval, index=3, source="a.png")
    certificate.verify()
    assert Certificate.from_dict(json.loads(json.dumps(certificate.to_dict()))) == certificate


@pytest.mark.parametrize(
    "change",
    [
        {"radius": 0.9},
        {"radius": 0.0},
        {"label": 1},
        {"label": None},
        {"pa_lower": 0.81},
        {"pb_upper": 0.01},
        {"n": 2000},
        {"n0": 101},
        {"sigma": 1.0},
        {"alpha": 0.01},
        {"interval": "bonferroni"},
        {"margin": "mono"},
        {"estimation": (900, 20, 60, 20)},
        {"selection": (15, 80, 5, 0)},
        {"estimation": (800, 120, 60, -20)},
        {"estimation": (800, 120, 60)},
        {"estimation": (800.0, 120, 60, 20)},
        {"interval": "wald"},
        {"sigma": -0.5},
        {"radius": float("nan")},
        {"label": False},
        {"n": 1000.0},
        {"estimation": [800, 120, 60, 20]},
        {"estimation": (800, 120, 60, np.int64(20))},
    ],
)
def test_every_changed_field_is_detected(change):
    with pytest.raises(VerificationError, match="Certificate 0 must"):
        dataclasses.replace(example(), **change).verify()


def test_a_difference_in_the_last_digits_is_not_a_mismatch():
    certificate = example()
    dataclasses.replace(certificate, radius=certificate.radius * (1 + 1e-12)).verify()


@pytest.mark.parametrize(
    ("selection", "estimation", "message"),
    [
        ([1], [1], "at least 2 ints >= 0, not all 0"),
        ([0, 0], [3, 1], "not all 0"),
        ([1, 2], [3, -1], "ints >= 0"),
        ([1, 2], [3.0, 1.5], "ints >= 0"),
        ([1, 2, 0], [3, 1], "the same classes, got 3 and 2"),
    ],
)
def test_lists_that_are_not_votes_are_refused(selection, estimation, message):
    with pytest.raises(ValueError, match=message):
        Certificate.from_counts(selection, estimation, sigma=0.5)


def test_stored_keys_must_be_those_of_a_certificate():
    with pytest.raises(ValueError, match="must hold the keys"):
        Certificate.from_dict({"label": 1})
