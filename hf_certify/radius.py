"""Certified l2 radii from probability bounds, and numbers printed so that no claim grows by rounding."""

import math
from decimal import ROUND_CEILING, ROUND_DOWN, Context, Decimal

from scipy import special

# the normal quantile is good to about 1e-15; the radius gives up more than that
_DOWN = 1e-9
# next to a tie the difference of two quantiles keeps only their absolute error, in units of sigma
_DOWN_ABSOLUTE = 1e-14

# more digits than any float has, so that cutting one off is always possible
_WIDE = Context(prec=800)


def mono_radius(sigma: float, pa_lower: float) -> float:
    """Return ``sigma * z(pa_lower)``, rounded down, and 0 unless ``pa_lower > 1/2``; ``z`` is the normal quantile.

    Within this l2 distance the top class keeps more than half of the smoothed votes (arXiv 1902.02918, Theorem 1 with
    ``pB = 1 - pA``). The radius is as certain as the bound.

    Args:
        sigma: Standard deviation of the noise, ``> 0``; the radius has its units.
        pa_lower: Lower bound on the top class probability, in ``[0, 1)``.

    Example:
        >>> 0.4999 < mono_radius(0.5, 0.8413448) < 0.5001
        True
        >>> mono_radius(0.5, 0.5)
        0.0
    """
    if pa_lower <= 0.5:
        return 0.0
    return float(sigma * special.ndtri(pa_lower) * (1 - _DOWN))


def multi_radius(sigma: float, pa_lower: float, pb_upper: float) -> float:
    """Return ``sigma / 2 * (z(pa_lower) - z(pb_upper))``, rounded down, and 0 unless ``pa_lower > pb_upper``.

    Within this l2 distance no class overtakes the top class (arXiv 1902.02918, Theorem 1). Works below
    ``pa_lower = 1/2``. The radius is as certain as the two bounds are together.

    Args:
        sigma: Standard deviation of the noise, ``> 0``; the radius has its units.
        pa_lower: Lower bound on the top class probability, in ``[0, 1)``.
        pb_upper: Upper bound on the probability of every other class, in ``(0, 1]``.

    Example:
        >>> multi_radius(0.5, 0.4, 0.3) > 0
        True
        >>> multi_radius(0.5, 0.3, 0.4)
        0.0
    """
    if pa_lower <= pb_upper:
        return 0.0
    radius = sigma / 2 * (special.ndtri(pa_lower) - special.ndtri(pb_upper)) * (1 - _DOWN)
    return max(0.0, float(radius - _DOWN_ABSOLUTE * sigma))


def format_down(value: float, digits: int = 3) -> str:
    """Return ``value >= 0`` with ``digits`` decimals, cut off rather than rounded: a printed claim is never too large.

    Read back as a float, the text is at most ``value``.

    Example:
        >>> format_down(0.9999)
        '0.999'
        >>> format_down(3 / 5)
        '0.600'
    """
    if not math.isfinite(value):
        return str(float(value))
    # the shortest decimal of the float: its exact value may lie just below a share such as 3 / 5
    unit = Decimal(1).scaleb(-digits)
    return str(Decimal(repr(float(value))).quantize(unit, rounding=ROUND_DOWN, context=_WIDE))


def format_failure(alpha: float, certificates: int) -> str:
    """Return ``min(1, alpha * certificates)`` with 3 significant digits, rounded up: no printed risk is too small.

    Example:
        >>> format_failure(0.001, 4), format_failure(0.00123456, 1)
        ('0.004', '0.00124')
    """
    # the shortest decimal of alpha: 3 * 0.1 in floats would be printed as 0.301
    risk = min(Decimal(1), Decimal(repr(float(alpha))) * certificates)
    return f"{Context(prec=3, rounding=ROUND_CEILING).plus(risk):g}"
