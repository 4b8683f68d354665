"""The oracle: certification in exact rational arithmetic. Slow, short, and independent of the rest of the package."""

import math
from collections.abc import Sequence
from fractions import Fraction
from statistics import NormalDist

# bounds are exact to 2**-50; a count of 60 draws then costs integers of 3,000 bits
_BISECTIONS = 50


def binomial_tail(k: int, n: int, p: Fraction) -> Fraction:
    """Return ``P(X >= k)`` for ``X ~ Binomial(n, p)``, exactly.

    Example:
        >>> binomial_tail(2, 2, Fraction(1, 2))
        Fraction(1, 4)
    """
    return sum((math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1)), Fraction(0))


def exact_lower(k: int, n: int, alpha: Fraction) -> Fraction:
    """Return the one-sided Clopper-Pearson lower bound: where ``k`` or more successes have chance ``alpha``.

    Args:
        k: Successes, in ``[0, n]``.
        n: Draws, ``>= 1``; meant for at most a few hundred.
        alpha: Failure probability, in ``(0, 1)``.

    Returns:
        A probability in ``[0, 1)``, at most ``2**-50`` below the true bound and never above it.

    Example:
        >>> float(exact_lower(2, 2, Fraction(1, 4)))
        0.5
    """
    if k == 0:
        return Fraction(0)
    low, high = Fraction(0), Fraction(1)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if binomial_tail(k, n, middle) <= alpha:
            low = middle
        else:
            high = middle
    return low


def exact_upper(k: int, n: int, alpha: Fraction) -> Fraction:
    """Return the one-sided Clopper-Pearson upper bound, as the lower bound of the failures.

    Example:
        >>> float(exact_upper(0, 2, Fraction(1, 4)))
        0.5
    """
    return 1 - exact_lower(n - k, n, alpha)


def buckets(selection: Sequence[int]) -> list[list[int]]:
    """Return the partition of the class partitioning method, the top class first.

    Written as the sentence it is: split the largest class off the rest until the rest holds no more votes than the
    runner-up.

    Example:
        >>> buckets([60, 15, 10, 9, 6])
        [[0], [1], [2], [3, 4]]
    """
    ranked = sorted(range(len(selection)), key=lambda label: (-selection[label], label))
    split = 2
    while sum(selection[label] for label in ranked[split:]) > selection[ranked[1]]:
        split += 1
    parts = [*([label] for label in ranked[:split]), ranked[split:]]
    return [part for part in parts if part]


def certified_radius(
    selection: Sequence[int], estimation: Sequence[int], *, sigma: float, alpha: Fraction, interval: str
) -> tuple[int, float]:
    """Return the class that the selection sample picks, and its radius with the natural margin of ``interval``.

    Args:
        selection: `[K]` votes that pick the class.
        estimation: `[K]` votes that give the bounds.
        sigma: Standard deviation of the noise, ``> 0``.
        alpha: Failure probability, in ``(0, 1)``.
        interval: ``cohen``, ``bonferroni``, ``cpm`` or ``max_upper``.

    Returns:
        The class, and an l2 radius in the units of ``sigma``: 0 for an abstention, not rounded down.

    Example:
        >>> label, radius = certified_radius([9, 1], [30, 0], sigma=1.0, alpha=Fraction(1, 1000), interval="cohen")
        >>> label, 0.8 < radius < 0.9
        (0, True)
    """
    top = max(range(len(selection)), key=lambda label: (selection[label], -label))
    groups = buckets(selection) if interval == "cpm" else [[top], *([j] for j in range(len(selection)) if j != top)]
    votes = [sum(estimation[label] for label in group) for group in groups]
    share = alpha / {"cohen": 1, "max_upper": 2}.get(interval, len(groups))
    lower = exact_lower(votes[0], sum(votes), share)
    upper = 1 - lower
    if interval != "cohen":
        upper = min(upper, max(exact_upper(count, sum(votes), share) for count in votes[1:]))
    if lower <= upper:
        return top, 0.0
    quantile = NormalDist().inv_cdf
    return top, sigma / 2 * (quantile(float(lower)) - quantile(float(upper)))
