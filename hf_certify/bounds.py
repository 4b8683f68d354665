"""Exact one-sided confidence bounds on class probabilities, from vote counts.

Every rule below spends ``alpha`` once and returns ``(pa_lower, pb_upper)`` with

    P(pa_lower <= p_top and max of the other p <= pb_upper) >= 1 - alpha

for a top class and a partition that were fixed before the counted draws were made. All rules then take
``min(pb_upper, 1 - pa_lower)``: probabilities sum to 1, so this follows from the first bound and costs nothing.
"""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from hf_certify.config import IntervalName, MarginName, check_alpha
from hf_certify.partition import partition_classes, rank_classes

Counts = NDArray[np.int64]

# the inverse beta function is good to about 1e-14; the bounds move outward by more than that
_OUTWARD = 1e-12

# a single bound gets a share of alpha, so it may lie below the least alpha of a certificate
_LEAST_SHARE = 1e-150


def clopper_pearson_lower(successes: ArrayLike, n: ArrayLike, alpha: float) -> NDArray[np.float64]:
    """Exact one-sided lower confidence bound on a binomial proportion.

    If ``successes ~ Binomial(n, p)`` then ``P(bound <= p) >= 1 - alpha`` for every ``p``. One-sided: the whole of
    ``alpha`` is on this side. Rounded down by a relative ``1e-12``.

    Args:
        successes: `[...]` ints in ``[0, n]``, broadcast against ``n``.
        n: `[...]` numbers of draws, ``>= 1``.
        alpha: Failure probability of each bound, in ``(0, 1)``.

    Returns:
        `[...]` float64 in ``[0, 1)``.

    Raises:
        ValueError: If ``alpha`` is outside ``(0, 1)``, or a count outside ``[0, n]``, or ``n < 1``.

    Example:
        >>> float(clopper_pearson_lower(10, 10, 0.5**10).round(9))
        0.5
    """
    k, draws = _checked(successes, n, alpha)
    # betaincinv(0, ...) is nan, and the bound there is 0 by definition
    bound = special.betaincinv(np.maximum(k, 1), draws - k + 1.0, alpha)
    return np.where(k == 0, 0.0, bound * (1 - _OUTWARD))


def clopper_pearson_upper(successes: ArrayLike, n: ArrayLike, alpha: float) -> NDArray[np.float64]:
    """Exact one-sided upper confidence bound on a binomial proportion, the mirror of ``clopper_pearson_lower``.

    If ``successes ~ Binomial(n, p)`` then ``P(p <= bound) >= 1 - alpha`` for every ``p``. Rounded up by a relative
    ``1e-12``.

    Args:
        successes: `[...]` ints in ``[0, n]``, broadcast against ``n``.
        n: `[...]` numbers of draws, ``>= 1``.
        alpha: Failure probability of each bound, in ``(0, 1)``.

    Returns:
        `[...]` float64 in ``(0, 1]``.

    Raises:
        ValueError: If ``alpha`` is outside ``(0, 1)``, or a count outside ``[0, n]``, or ``n < 1``.

    Example:
        >>> float(clopper_pearson_upper(0, 10, 0.5**10).round(9))
        0.5
    """
    k, draws = _checked(successes, n, alpha)
    # the complemented inverse takes alpha itself: forming 1 - alpha would lose its last digits
    bound = special.betainccinv(k + 1.0, np.maximum(draws - k, 1), alpha)
    return np.where(k == draws, 1.0, np.minimum(bound * (1 + _OUTWARD), 1.0))


def cohen(estimation: Counts, top: int, alpha: float) -> tuple[float, float]:
    """One bound at ``alpha``, on the top class (Cohen et al. 2019, arXiv 1902.02918); the others get the remainder.

    Args:
        estimation: `[K]` votes of the estimation sample.
        top: Class picked on the selection sample.
        alpha: Failure probability, in ``(0, 1)``.

    Returns:
        ``(pa_lower, 1 - pa_lower)``.
    """
    lower = float(clopper_pearson_lower(estimation[top], estimation.sum(), alpha))
    return lower, _at_most_remainder(1.0, lower)


def max_upper(estimation: Counts, top: int, alpha: float) -> tuple[float, float]:
    """Two bounds at ``alpha / 2``: the top class, and the largest other count of the same sample.

    Valid for any number of classes: only the bound of the true runner-up has to hold, and the bound of the largest
    count is never below it, because the bound rises with the count.

    Args:
        estimation: `[K]` votes of the estimation sample, ``K >= 2``.
        top: Class picked on the selection sample.
        alpha: Failure probability of both bounds together, in ``(0, 1)``.

    Returns:
        ``(pa_lower, pb_upper)``.
    """
    return _top_against_largest(estimation, top, alpha / 2)


def bonferroni(estimation: Counts, top: int, alpha: float) -> tuple[float, float]:
    """K bounds at ``alpha / K``: the top class from below and each of the K - 1 others from above.

    Args:
        estimation: `[K]` votes of the estimation sample, ``K >= 2``.
        top: Class picked on the selection sample.
        alpha: Failure probability of all bounds together, in ``(0, 1)``.

    Returns:
        ``(pa_lower, pb_upper)``. The largest of the K - 1 upper bounds is that of the largest count.
    """
    return _top_against_largest(estimation, top, alpha / len(estimation))


def cpm(estimation: Counts, selection: Counts, alpha: float) -> tuple[float, float]:
    """One bound at ``alpha / m`` for each of the m buckets of the partition that the selection sample made.

    Args:
        estimation: `[K]` votes of the estimation sample, independent of ``selection``.
        selection: `[K]` votes of the selection sample, ``K >= 2``.
        alpha: Failure probability of all bounds together, in ``(0, 1)``.

    Returns:
        ``(pa_lower, pb_upper)``; a bucket's bound covers each class in it.
    """
    buckets = partition_classes(selection)
    votes = np.array([estimation[list(bucket)].sum() for bucket in buckets])
    return _top_against_largest(votes, 0, alpha / len(buckets))


def probability_bounds(
    selection: Counts, estimation: Counts, *, alpha: float, interval: IntervalName, margin: MarginName
) -> tuple[float, float]:
    """Return ``(pa_lower, pb_upper)`` for the class that the selection sample ranks first.

    Both hold together with probability ``>= 1 - alpha``. ``margin="mono"`` needs the first alone, which then gets the
    whole of ``alpha`` under any ``interval``.

    Args:
        selection: `[K]` votes of the selection sample, ``K >= 2``.
        estimation: `[K]` votes of the estimation sample, independent of ``selection``.
        alpha: Failure probability, in ``(0, 1)``.
        interval: Rule, see ``CertifyConfig``.
        margin: ``mono`` or ``multi``.

    Raises:
        ValueError: If ``alpha`` is outside ``(0, 1)`` or a count is negative.
    """
    top = int(rank_classes(selection)[0])
    if margin == "mono" or interval == "cohen":
        return cohen(estimation, top, alpha)
    if interval == "cpm":
        return cpm(estimation, selection, alpha)
    rule = max_upper if interval == "max_upper" else bonferroni
    return rule(estimation, top, alpha)


def minimum_draws(alpha: float, *, interval: IntervalName, margin: MarginName, num_classes: int) -> int:
    """Return the smallest ``n`` with which unanimous votes give a radius above 0.

    With ``m`` bounds at ``alpha / m`` unanimous votes give ``pa_lower = (alpha / m) ** (1 / n)``, which must
    exceed 1/2.

    Example:
        >>> minimum_draws(0.001, interval="cohen", margin="mono", num_classes=10)
        10
        >>> minimum_draws(0.001, interval="max_upper", margin="multi", num_classes=10)
        11
    """
    check_alpha(alpha)
    # unanimous votes leave cpm with three buckets: the top, a runner-up without votes, all others
    shares = {"cohen": 1, "max_upper": 2, "bonferroni": num_classes, "cpm": min(num_classes, 3)}
    share = 1 if margin == "mono" else shares[interval]
    return math.floor(math.log2(share / alpha)) + 1


def require_certifiable(alpha: float, n: int, *, interval: IntervalName, margin: MarginName, num_classes: int) -> None:
    """Raise unless unanimous votes would give a radius above 0.

    Raises:
        ValueError: If ``n`` is below ``minimum_draws``: every input would abstain whatever the model does.
    """
    least = minimum_draws(alpha, interval=interval, margin=margin, num_classes=num_classes)
    if n < least:
        raise ValueError(
            f"n must be at least {least} for interval={interval!r}, alpha={alpha!r} and {num_classes} classes, got "
            f"{n!r}: with fewer draws even unanimous votes certify nothing."
        )


def _top_against_largest(votes: Counts, top: int, alpha: float) -> tuple[float, float]:
    """Bound the top count from below and the largest other count from above, each at ``alpha``."""
    n = votes.sum()
    lower = float(clopper_pearson_lower(votes[top], n, alpha))
    upper = float(clopper_pearson_upper(np.delete(votes, top).max(), n, alpha))
    return lower, _at_most_remainder(upper, lower)


def _at_most_remainder(upper: float, lower: float) -> float:
    """Return ``min(upper, 1 - lower)``, the difference rounded up."""
    return min(upper, math.nextafter(1.0 - lower, 2.0), 1.0)


def _checked(successes: ArrayLike, n: ArrayLike, alpha: float) -> tuple[Counts, Counts]:
    check_alpha(alpha, _LEAST_SHARE)
    k, draws = np.broadcast_arrays(np.asarray(successes, dtype=np.int64), np.asarray(n, dtype=np.int64))
    if np.any(draws < 1) or np.any(k < 0) or np.any(k > draws):
        raise ValueError(f"successes must be in [0, n] with n >= 1, got successes={successes!r}, n={n!r}.")
    return k, draws
