"""One certificate: a claim together with the counts it follows from, so that it can be checked without the model."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from hf_certify.bounds import probability_bounds
from hf_certify.config import CertifyConfig, IntervalName, MarginName, MarginOption
from hf_certify.errors import VerificationError
from hf_certify.partition import rank_classes
from hf_certify.radius import mono_radius, multi_radius

# another build of scipy may differ in the last digits; a radius is rounded down by as much
_RELATIVE_TOLERANCE = 1e-9

# the type of each stored value, exactly: a bool is no int, and 1000.0 is no number of draws
_STORED: dict[str, tuple[type, ...]] = {
    "index": (int,),
    "output": (int, type(None)),
    "source": (str, type(None)),
    "label": (int, type(None)),
    "radius": (float,),
    "pa_lower": (float,),
    "pb_upper": (float,),
    "selection": (list, tuple),
    "estimation": (list, tuple),
    "n0": (int,),
    "n": (int,),
    "sigma": (float, int),
    "alpha": (float,),
    "interval": (str,),
    "margin": (str,),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Certificate:
    """The claim that the smoothed classifier predicts ``label`` within l2 distance ``radius`` of one input.

    Wrong with probability at most ``alpha`` over the noise, for a seed chosen independently of model and input. K is
    the number of classes.

    Attributes:
        index: Which input of the run, ``>= 0``; part of the key of its noise.
        output: Which of several answers to the input, such as a label among others, or ``None`` if there is one.
        source: Where the input came from, such as a path, or ``None``.
        label: The certified class in ``[0, K)``, or ``None`` for an abstention.
        radius: l2, ``>= 0``, in the units in which the noise was added; 0 for an abstention.
        pa_lower: Lower bound on the probability of the class that the selection sample ranks first.
        pb_upper: Upper bound on the probability of every other class.
        selection: `[K]` votes of the selection sample.
        estimation: `[K]` votes of the estimation sample.
        n0: Draws of the selection sample.
        n: Draws of the estimation sample.
        sigma: Standard deviation of the noise, ``> 0``.
        alpha: Failure probability, in ``(0, 1)``.
        interval: Rule that gave the bounds.
        margin: ``mono`` or ``multi``.
    """

    index: int
    output: int | None
    source: str | None
    label: int | None
    radius: float
    pa_lower: float
    pb_upper: float
    selection: tuple[int, ...]
    estimation: tuple[int, ...]
    n0: int
    n: int
    sigma: float
    alpha: float
    interval: IntervalName
    margin: MarginName

    @classmethod
    def from_counts(
        cls,
        selection: Sequence[int],
        estimation: Sequence[int],
        *,
        sigma: float,
        alpha: float = 0.001,
        interval: IntervalName = "max_upper",
        margin: MarginOption = "auto",
        index: int = 0,
        output: int | None = None,
        source: str | None = None,
    ) -> Self:
        """Return the certificate that two independent samples of votes give.

        Args:
            selection: `[K]` votes that pick the class, ``K >= 2``, at least one vote.
            estimation: `[K]` votes that give the bounds, at least one vote.
            sigma: Standard deviation of the noise, ``> 0``; the radius has its units.
            alpha: Failure probability, in ``(0, 1)``.
            interval: Rule, see ``CertifyConfig``; must have been chosen before the counts were seen.
            margin: ``auto``, ``mono`` or ``multi``; likewise.
            index: Which input of the run.
            output: Which of several answers to it.
            source: Where the input came from.

        Raises:
            ValueError: If a setting is out of range, or the two samples are not votes over the same classes.

        Example:
            >>> certificate = Certificate.from_counts([9, 1], [990, 10], sigma=0.5)
            >>> certificate.label, 0.97 < certificate.radius < 0.98
            (0, True)
        """
        resolved = CertifyConfig(sigma=sigma, alpha=alpha, interval=interval, margin=margin).resolved_margin
        first, second = as_votes(selection), as_votes(estimation)
        if len(first) != len(second):
            raise ValueError(f"Both samples must count the same classes, got {len(first)} and {len(second)} of them.")
        lower, upper = probability_bounds(first, second, alpha=alpha, interval=interval, margin=resolved)
        radius = mono_radius(sigma, lower) if resolved == "mono" else multi_radius(sigma, lower, upper)
        return cls(
            index=index,
            output=output,
            source=source,
            label=int(rank_classes(first)[0]) if radius > 0 else None,
            radius=radius,
            pa_lower=lower,
            pb_upper=upper,
            selection=tuple(first.tolist()),
            estimation=tuple(second.tolist()),
            n0=int(first.sum()),
            n=int(second.sum()),
            sigma=sigma,
            alpha=alpha,
            interval=interval,
            margin=resolved,
        )

    @property
    def abstained(self) -> bool:
        """Whether nothing is claimed about this input."""
        return self.label is None

    def with_interval(self, interval: IntervalName, margin: MarginOption = "auto") -> Self:
        """Return the certificate that the same votes give under another rule.

        Each of the two is wrong with probability at most ``alpha``. Keeping whichever radius is larger is not:
        state the rule before the draws and report that one.
        """
        return self.from_counts(
            self.selection,
            self.estimation,
            sigma=self.sigma,
            alpha=self.alpha,
            interval=interval,
            margin=margin,
            index=self.index,
            output=self.output,
            source=self.source,
        )

    def verify(self) -> None:
        """Recompute the claim from the votes.

        Finds corruption and inconsistency, not forgery: votes that were made up consistently pass.

        Raises:
            VerificationError: If the votes are not votes, do not add up to ``n0`` and ``n``, or give another claim.
        """
        try:
            expected = self.with_interval(self.interval, self.margin)
        except (ValueError, TypeError) as error:
            raise VerificationError(
                f"Certificate {self.index} must carry usable votes and settings: {error}"
            ) from error
        for name, declared in dataclasses.asdict(self).items():
            implied = getattr(expected, name)
            if not _agrees(declared, implied):
                raise VerificationError(
                    f"Certificate {self.index} must follow from its votes: they give {name}={implied!r}, it declares "
                    f"{declared!r}. Do not rely on it; certify this input again."
                )

    def to_dict(self) -> dict[str, Any]:
        """Return the certificate as plain values, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Return the certificate stored by ``to_dict``, not yet verified.

        Raises:
            TypeError: If a value is not of the type that ``to_dict`` gives it.
            ValueError: If a key is missing or unknown.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if values.keys() != names:
            raise ValueError(f"A certificate must hold the keys {sorted(names)}, got {sorted(values)!r}.")
        for name, kinds in _STORED.items():
            if type(values[name]) not in kinds:
                raise TypeError(f"{name} must be {' or '.join(k.__name__ for k in kinds)}, got {values[name]!r}.")
        votes = {name: tuple(values[name]) for name in ("selection", "estimation")}
        if any(type(count) is not int for sample in votes.values() for count in sample):
            raise TypeError(f"Votes must be int, got {votes!r}.")
        return cls(**{**values, **votes})


def as_votes(counts: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    """Return votes `[K]` as int64, after checking that they are votes."""
    votes = np.asarray(counts)
    if votes.ndim != 1 or len(votes) < 2 or votes.dtype.kind not in "iu" or votes.min() < 0 or votes.sum() < 1:
        raise ValueError(f"Votes must be a list of at least 2 ints >= 0, not all 0, got {counts!r}.")
    return votes.astype(np.int64)


def _agrees(declared: object, implied: object) -> bool:
    """Compare types and values exactly, but floats with the relative tolerance that a radius has in reserve."""
    if type(declared) is not type(implied):
        return False
    if isinstance(declared, tuple) and isinstance(implied, tuple):
        return len(declared) == len(implied) and all(map(_agrees, declared, implied))
    if isinstance(declared, float) and isinstance(implied, float):
        return abs(declared - implied) <= _RELATIVE_TOLERANCE * abs(implied)
    return declared == implied
