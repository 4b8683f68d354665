"""The settings of one run: a frozen dataclass that is also the format on disk and on the command line."""

import dataclasses
import math
from typing import Any, Literal, Self, cast, get_args

IntervalName = Literal["cohen", "bonferroni", "cpm", "max_upper"]
MarginName = Literal["mono", "multi"]
MarginOption = Literal["auto", "mono", "multi"]
BatchSize = int | Literal["auto"]

# 2**128: the width of the entropy that seed=None takes from the operating system
MAX_SEED = 2**128

# with eight standard deviations of noise at both ends, nothing leaves float32
MAX_SIGMA = 1e37

# further down the inverse beta function of scipy is NaN or loses its digits
MIN_ALPHA = 1e-100


@dataclasses.dataclass(frozen=True, kw_only=True)
class CertifyConfig:
    """Validated settings of a certification run.

    Attributes:
        sigma: Standard deviation of the noise, in ``(0, 1e37]``, in the units of the space: raw pixels in
            ``[0, 1]`` for images.
        n0: Draws of the selection sample, ``>= 1``, which picks the class (and the partition of ``cpm``).
        n: Draws of the estimation sample, ``>= 1``, independent of the first, which gives the bounds.
        alpha: Failure probability of one certificate, in ``[1e-100, 1)``. ``M`` inputs together may fail with
            up to ``alpha * M``.
        interval: How the class probabilities are bounded: ``cohen``, ``bonferroni``, ``cpm`` or ``max_upper``.
        margin: ``mono`` uses the bound on the top class alone, ``multi`` also bounds the runner-up, ``auto`` is
            ``mono`` for ``cohen`` and ``multi`` for the others.
        batch_size: Rows of every forward pass, ``>= 1``, or ``auto``. Recorded, because votes on a decision boundary
            can depend on it through floating-point rounding.
        seed: Root of all noise, in ``[0, 2**128)``. ``None`` draws 128 bits from the operating system.

    Raises:
        TypeError: If a value is of the wrong kind.
        ValueError: If a value is out of range or not one of the names above.

    Example:
        >>> from hf_certify import CertifyConfig
        >>> config = CertifyConfig(sigma=0.5, n=10_000)
        >>> config.interval, config.resolved_margin
        ('max_upper', 'multi')
        >>> CertifyConfig.from_dict(config.to_dict()) == config
        True
    """

    sigma: float = dataclasses.field(
        metadata={"help": "Standard deviation of the noise, in raw pixel units: images lie in [0, 1]."}
    )
    n0: int = dataclasses.field(
        default=100, metadata={"help": "Draws of the selection sample, which picks the class."}
    )
    n: int = dataclasses.field(
        default=100_000, metadata={"help": "Draws of the estimation sample, which gives the bounds."}
    )
    alpha: float = dataclasses.field(
        default=0.001, metadata={"help": "Failure probability of one certificate, in (0, 1)."}
    )
    interval: IntervalName = dataclasses.field(
        default="max_upper", metadata={"help": "Bound: cohen, bonferroni, cpm or max_upper."}
    )
    margin: MarginOption = dataclasses.field(default="auto", metadata={"help": "Margin: auto, mono or multi."})
    batch_size: BatchSize = dataclasses.field(
        default="auto", metadata={"help": "Rows of every forward pass, or auto."}
    )
    seed: int | None = dataclasses.field(
        default=None, metadata={"help": "Root of all noise; without it 128 bits from the system."}
    )

    def __post_init__(self) -> None:
        _check_sigma(self.sigma)
        check_draws("n0", self.n0)
        check_draws("n", self.n)
        check_alpha(self.alpha)
        _check_choice("interval", self.interval, get_args(IntervalName))
        _check_choice("margin", self.margin, get_args(MarginOption))
        if self.batch_size != "auto":
            check_draws("batch_size", self.batch_size, remedy=" or 'auto'")
        if self.seed is not None:
            check_seed(self.seed)

    @property
    def resolved_margin(self) -> MarginName:
        """The margin with ``auto`` replaced: a function of ``interval`` only, so it is fixed before any draw."""
        if self.margin == "auto":
            return "mono" if self.interval == "cohen" else "multi"
        return self.margin

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Return the settings stored by ``to_dict``.

        Raises:
            ValueError: If a key is unknown or ``sigma`` is missing: a setting that is not understood voids the report.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(values.keys() - known):
            raise ValueError(
                f"A configuration may hold only {sorted(known)}, got also {unknown!r}: update the package."
            )
        if "sigma" not in values:
            raise ValueError(f"A configuration must hold 'sigma', got {sorted(values)!r}.")
        return cls(**values)

    @classmethod
    def help_text(cls, name: str) -> str:
        """Return the one-line help of a setting, written once for the command line."""
        return cast(str, cls.__dataclass_fields__[name].metadata["help"])


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _require_real(name: str, value: object) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}.")


def _check_sigma(sigma: float) -> None:
    """Raise unless ``sigma`` is a finite positive number."""
    _require_real("sigma", sigma)
    # as comparisons: an int may be too large for a float
    if not 0 < sigma < math.inf:
        raise ValueError(f"sigma must be finite and > 0, got {sigma!r}: without noise there is nothing to certify.")
    if sigma > MAX_SIGMA:
        raise ValueError(f"sigma must be at most {MAX_SIGMA:g}, got {sigma!r}: float32 would overflow; rescale x.")


def check_alpha(alpha: float, least: float = MIN_ALPHA) -> None:
    """Raise unless ``alpha`` is in ``[least, 1)``."""
    _require_real("alpha", alpha)
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must be in (0, 1), got {alpha!r}: it is a failure probability, 0.001 is customary.")
    if alpha < least:
        raise ValueError(
            f"alpha must be at least {least:g}, got {alpha!r}: bounds further down cannot be computed; choose a "
            f"larger alpha."
        )


def check_draws(name: str, value: int, remedy: str = "") -> None:
    """Raise unless ``value`` is an int ``>= 1``; ``name`` and ``remedy`` go into the sentence."""
    if not _is_int(value):
        raise TypeError(f"{name} must be an int >= 1{remedy}, got {value!r} of type {type(value).__name__}.")
    if value < 1:
        raise ValueError(f"{name} must be an int >= 1{remedy}, got {value!r}.")


def check_index(index: int) -> None:
    """Raise unless ``index`` is an int ``>= 0``."""
    if not _is_int(index):
        raise TypeError(f"index must be an int >= 0 or None, got {index!r} of type {type(index).__name__}.")
    if index < 0:
        raise ValueError(f"index must be an int >= 0, got {index!r}.")


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")


def check_seed(seed: int) -> None:
    """Raise unless ``seed`` is an int in ``[0, 2**128)``."""
    if not _is_int(seed):
        raise TypeError(f"seed must be an int in [0, 2**128) or None, got {seed!r} of type {type(seed).__name__}.")
    if not 0 <= seed < MAX_SEED:
        raise ValueError(f"seed must be in [0, 2**128), got {seed!r}.")
