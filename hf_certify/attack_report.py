"""What an attack found, with the votes that show it, beside what was certified."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from hf_certify.config import check_alpha, check_draws, check_seed
from hf_certify.errors import VerificationError
from hf_certify.partition import rank_classes
from hf_certify.radius import format_down, format_failure
from hf_certify.report import CertificationReport
from hf_certify.smoothing import Prediction

# raise it whenever the meaning of a stored key changes
ATTACK_SCHEMA = 1

# what is strictly inside a radius is at least this share of it away from the edge
STRICTLY = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttackConfig:
    """Settings of an attack on the smoothed classifier.

    Attributes:
        steps: Steps along the gradient, ``>= 1``.
        step_size: Length of a step, ``> 0``, in the units of the radius. ``None`` means 2.5 times the radius of the
            ball divided by ``steps``: far enough to reach the edge and to turn there.
        samples: Noisy copies in every step, ``>= 1``, over which the gradient is averaged.
        radii: l2, ``> 0``: balls that are searched besides that of each certificate, where they are larger.
        box: Lowest and highest value of a perturbed input, ``(0, 1)`` for pixels: the attacker must then hand in a
            valid image. ``None`` lets him leave it: certificates hold on all of space.
        n: Draws of the verdict, ``>= 1``: whether the smoothed classifier predicts another class at what was found.
        alpha: Failure probability of each verdict, in ``(0, 1)``.
        seed: Root of all noise of the attack, in ``[0, 2**128)``; ``None`` draws one.

    Raises:
        TypeError: If a number of steps or draws, or the seed, is no int.
        ValueError: If a value is out of range.

    Example:
        >>> AttackConfig(radii=(0.5, 0.25))
        Traceback (most recent call last):
        ValueError: radii must be finite, > 0 and ascending, got (0.5, 0.25).
    """

    steps: int = 20
    step_size: float | None = None
    samples: int = 32
    radii: tuple[float, ...] = ()
    box: tuple[float, float] | None = None
    n: int = 10_000
    alpha: float = 1e-6
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "samples", "n"):
            check_draws(name, getattr(self, name))
        if self.step_size is not None and not 0 < self.step_size < math.inf:
            raise ValueError(f"step_size must be finite and > 0, got {self.step_size!r}.")
        if not all(0 < radius < math.inf for radius in self.radii) or list(self.radii) != sorted(set(self.radii)):
            raise ValueError(f"radii must be finite, > 0 and ascending, got {self.radii!r}.")
        if self.box is not None and not self.box[0] < self.box[1]:
            raise ValueError(f"box must be (lowest, highest) with lowest < highest, got {self.box!r}.")
        check_alpha(self.alpha)
        if self.seed is not None:
            check_seed(self.seed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attempt:
    """A search of the ball around one input, and the verdict on the worst point that it found.

    Attributes:
        index: Which input of the run.
        output: Which of several answers to it, or ``None``.
        label: The class to get away from: the certified one, or the leader of the votes of an abstention.
        certified: Certified radius, 0 for an abstention.
        radius: l2 radius of the ball; a certified one is searched strictly inside.
        norm: l2 distance of the point that was found, at most ``radius``.
        prediction: Of the smoothed classifier at that point, with its votes and p-value.
    """

    index: int
    output: int | None
    label: int
    certified: float
    radius: float
    norm: float
    prediction: Prediction

    @property
    def succeeded(self) -> bool:
        """Whether another class is predicted at the point; wrong with probability at most ``prediction.alpha``."""
        return self.prediction.label not in (None, self.label)

    @property
    def inside(self) -> bool:
        """Whether the point lies inside the certified radius."""
        return self.norm < self.certified


@dataclasses.dataclass(frozen=True, kw_only=True)
class GapRow:
    """Certified against attacked accuracy at one radius; the true one of the smoothed classifier lies between.

    Attributes:
        radius: l2, in the units of the noise.
        certified: Share of the answers that are certified as right within the radius: a lower bound.
        attacked: Share that no attack has turned within the radius: an upper bound, as good as the attack.
    """

    radius: float
    certified: float
    attacked: float

    @property
    def gap(self) -> float:
        """What neither a proof nor an attack has settled."""
        return self.attacked - self.certified


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttackReport:
    """All attempts on the certificates of a report.

    Attributes:
        report: What was attacked.
        config: Settings, with the seed that was used.
        attempts: In the order of the certificates, the certified ball of each first.
    """

    report: CertificationReport
    config: AttackConfig
    attempts: tuple[Attempt, ...]

    @property
    def broken(self) -> tuple[Attempt, ...]:
        """The attempts that succeeded inside a certified radius: none, but for the failure probability."""
        return tuple(attempt for attempt in self.attempts if attempt.succeeded and attempt.inside)

    def verify(self) -> None:
        """Raise if a certificate is contradicted.

        A certificate is wrong with probability at most its ``alpha``, and a verdict with that of the attack, so a
        contradiction can be chance, but not several of a few.

        Raises:
            VerificationError: If an attempt succeeded inside a certified radius; the message names the first.
        """
        if not self.broken:
            return
        first, total = self.broken[0], len(self.report.certificates)
        risk = format_failure(self.report.config.alpha + self.config.alpha, total)
        raise VerificationError(
            f"No attack may succeed inside a certified radius, got {len(self.broken)} of {total} certificates "
            f"contradicted, the first for input {first.index}: class {first.prediction.label} at distance "
            f"{first.norm:.6g}, where class {first.label} is certified up to {first.certified:.6g}, p-value "
            f"{first.prediction.p_value:.3g}. By chance any of them is with probability at most {risk}: check that "
            f"the model is deterministic and treats every row of a batch by itself."
        )

    def gap(self, labels: Sequence[int] | None = None) -> tuple[GapRow, ...]:
        """Return certified and attacked accuracy at 0 and at every radius of the settings.

        At radius 0 an answer counts as right if its class leads the votes of the estimation sample.

        Args:
            labels: True class of each answer, in the order of the certificates. Without them every answer counts as
                right at radius 0.

        Raises:
            ValueError: If there is not one class index for each certificate.
        """
        certificates = self.report.certificates
        leaders = [_leader(certificate.estimation) for certificate in certificates]
        radii = (0.0, *self.config.radii)
        truth = leaders if labels is None else labels
        certified = self.report.certified_accuracy(truth, radii)
        fallen: dict[tuple[int, int | None], float] = {}
        for attempt in self.attempts:
            if attempt.succeeded:
                place = attempt.index, attempt.output
                fallen[place] = min(attempt.norm, fallen.get(place, math.inf))
        rows = []
        for radius, share in zip(radii, certified, strict=True):
            standing = sum(
                leader == label and fallen.get((certificate.index, certificate.output), math.inf) > radius
                for certificate, leader, label in zip(certificates, leaders, truth, strict=True)
            )
            rows.append(GapRow(radius=radius, certified=share, attacked=standing / len(certificates)))
        return tuple(rows)

    def summary(self, labels: Sequence[int] | None = None) -> str:
        """Return a few lines of text: the gap at every radius, and what happened inside the certified ones.

        Args:
            labels: True class of each answer, see ``gap``.
        """
        inside = [attempt for attempt in self.attempts if attempt.radius <= attempt.certified]
        outside = [attempt for attempt in self.attempts if attempt.radius > attempt.certified]
        lines = [f"{'l2 radius':>9}  {'certified':>9}  {'attacked':>8}  {'gap':>6}"]
        lines += [
            f"{row.radius:>9g}  {format_down(row.certified):>9}  {row.attacked:>8.3f}  {row.gap:>6.3f}"
            for row in self.gap(labels)
        ]
        lines.append(
            f"inside certified radii {len(self.broken)} of {len(inside)} attempts succeeded, outside "
            f"{sum(attempt.succeeded for attempt in outside)} of {len(outside)}; {self.config.steps} steps with "
            f"{self.config.samples} noisy copies, verdicts of {self.config.n} votes at alpha {self.config.alpha:g}"
        )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return settings and attempts as plain values, ready for JSON."""
        return {
            "schema": ATTACK_SCHEMA,
            "config": dataclasses.asdict(self.config),
            "attempts": [dataclasses.asdict(attempt) for attempt in self.attempts],
        }


def _leader(votes: Sequence[int]) -> int:
    return int(rank_classes(np.array(votes, dtype=np.int64))[0])
