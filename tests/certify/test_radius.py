"""Radii against mpmath, and rounding that never adds to a claim."""

import math
from decimal import Decimal

import mpmath
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_certify.radius import format_down, format_failure, mono_radius, multi_radius

probabilities = st.floats(1e-6, 1 - 1e-6)


def quantile(p: float) -> mpmath.mpf:
    with mpmath.workdps(40):
        return mpmath.sqrt(2) * mpmath.erfinv(2 * mpmath.mpf(p) - 1)


@given(probabilities, st.floats(0.01, 10))
def test_mono_radius_is_just_below_the_exact_one(p, sigma):
    """Oracle: the normal quantile with 40 digits."""
    exact = max(0.0, sigma * quantile(p))
    assert mono_radius(sigma, p) <= exact
    assert mono_radius(sigma, p) == pytest.approx(float(exact), rel=1e-8, abs=1e-15)


@given(probabilities, probabilities, st.floats(0.01, 10))
def test_multi_radius_is_just_below_the_exact_one(pa, pb, sigma):
    """Oracle: the normal quantile with 40 digits. Next to a tie the difference of two quantiles keeps fewer digits."""
    exact = max(mpmath.mpf(0), sigma / 2 * (quantile(pa) - quantile(pb)))
    assert multi_radius(sigma, pa, pb) <= exact + 1e-14 * sigma
    assert multi_radius(sigma, pa, pb) == pytest.approx(float(exact), rel=1e-8, abs=1e-13 * sigma)


@given(st.floats(0.5, 1 - 1e-9, exclude_min=True))
def test_multi_with_the_remainder_as_runner_up_is_mono(pa):
    assert multi_radius(0.5, pa, 1 - pa) == pytest.approx(mono_radius(0.5, pa), rel=1e-6, abs=1e-12)


def test_nothing_is_certified_without_a_lead():
    assert mono_radius(1.0, 0.5) == mono_radius(1.0, 0.0) == 0.0
    assert multi_radius(1.0, 0.3, 0.3) == multi_radius(1.0, 0.0, 1.0) == 0.0


@given(st.floats(0, 1e6), st.integers(0, 6))
def test_printed_numbers_are_never_above_the_value(value, digits):
    """Oracle: the number read back, and exact decimals; the loss is less than one unit of the last digit."""
    printed = format_down(value, digits)
    assert float(printed) <= value
    assert Decimal(value) - Decimal(printed) < Decimal(10) ** -digits


def test_a_radius_just_below_a_round_number_does_not_print_as_it():
    assert format_down(math.nextafter(1.0, 0), 2) == "0.99"
    assert format_down(1.0, 2) == "1.00"


@pytest.mark.parametrize("total", [5, 7, 10, 1000])
def test_a_share_with_few_decimals_prints_as_it_is(total):
    """Oracle: integer division; 3 / 5 as a float is a little less than 0.6."""
    for part in range(total + 1):
        assert format_down(part / total) == f"{part * 1000 // total // 1000}.{part * 1000 // total % 1000:03d}"


def test_a_multi_radius_next_to_a_tie_is_not_above_the_exact_one():
    """Oracle: the normal quantile with 40 digits, where the relative reserve alone is 0.4 % too little."""
    pa, pb = 0.3, 0.299999999999999
    exact = (quantile(pa) - quantile(pb)) / 2
    assert 0 <= multi_radius(1.0, pa, pb) <= exact
    assert multi_radius(1.0, 0.3, math.nextafter(0.3, 0)) == 0.0


@pytest.mark.parametrize(
    ("value", "text"), [(1e26, "1" + 26 * "0" + ".000"), (1e300, None), (math.inf, "inf"), (5e-324, "0.000")]
)
def test_any_float_can_be_printed(value, text):
    printed = format_down(value)
    assert float(printed) <= value
    assert text in (None, printed)


@given(st.floats(1e-100, 1, exclude_max=True), st.integers(1, 10**6))
def test_a_printed_risk_is_never_below_the_risk(alpha, certificates):
    """Oracle: exact decimals of the shortest spelling of alpha."""
    exact = min(Decimal(1), Decimal(repr(alpha)) * certificates)
    assert exact <= Decimal(format_failure(alpha, certificates)) <= exact * Decimal("1.01")


@pytest.mark.parametrize(("alpha", "certificates", "text"), [(0.1, 3, "0.3"), (0.001, 7, "0.007"), (0.5, 9, "1")])
def test_a_risk_with_few_digits_prints_as_it_is(alpha, certificates, text):
    assert format_failure(alpha, certificates) == text
