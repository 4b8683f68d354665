"""The settings of Highway-BP: one dataclass for Python, JSON and the command line."""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

RESIDUAL_NAMES = ("default", "identity", "zero")

logger = logging.getLogger(__name__)


def check_k(k: object) -> int | None:
    """Return ``k`` if it is a number of iterations.

    Args:
        k: A whole number from 0, or ``None`` for exact backpropagation.

    Returns:
        The same value.

    Raises:
        TypeError: If ``k`` is neither an int nor ``None``.
        ValueError: If ``k`` is negative.
    """
    if k is None:
        return None
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k must be a whole number from 0, or None for exact backpropagation, got {k!r}.")
    if k < 0:
        raise ValueError(f"k must be a whole number from 0, or None for exact backpropagation, got {k!r}.")
    return k


def check_residual(residual: object) -> str | float:
    """Return the residual setting in its plain form: a name, or a factor as a float.

    Args:
        residual: One of ``RESIDUAL_NAMES``, a number in ``[0, 1]``, that number as text, or ``None`` for "default".

    Returns:
        The name, or the number.

    Raises:
        TypeError: If ``residual`` is neither text nor a number.
        ValueError: If the name is unknown or the number is outside ``[0, 1]``.
    """
    message = f"residual must be one of {RESIDUAL_NAMES} or a number in [0, 1], got {residual!r}."
    if residual is None:
        return "default"
    if isinstance(residual, str) and residual in RESIDUAL_NAMES:
        return residual
    if isinstance(residual, bool) or not isinstance(residual, str | float | int):
        raise TypeError(message)
    try:
        factor = float(residual)
    except ValueError:
        raise ValueError(message) from None
    if not 0.0 <= factor <= 1.0:
        raise ValueError(message)
    return factor


def check_enabled(enabled: object) -> bool:
    """Return ``enabled`` if it is a bool: text such as "false" would count as true.

    Raises:
        TypeError: If it is of another kind.
    """
    if not isinstance(enabled, bool):
        raise TypeError(f"enabled must be True or False, got {enabled!r}.")
    return enabled


@dataclass
class HighwayConfig:
    """Settings of Highway-BP, accepted by ``transformers.HfArgumentParser``.

    Attributes:
        k: Number of iterations; exact from ``k = L - 1`` for ``L`` blocks, and with ``None``.
        residual: The residual map ``K``: a name of ``RESIDUAL_NAMES`` or a factor in ``[0, 1]``.
        blocks: Dotted path to the stack of blocks; ``None`` finds it.
        enabled: ``False`` leaves every backward pass as it is.

    Raises:
        TypeError: If a value is of the wrong kind.
        ValueError: If ``k`` is negative, ``residual`` is unknown or outside ``[0, 1]``, or ``blocks`` is empty.

    Example:
        >>> HighwayConfig(k=1, residual=0.8).to_dict()
        {'k': 1, 'residual': 0.8, 'blocks': None, 'enabled': True}
    """

    k: int | None = field(
        default=None, metadata={"help": "Highway-BP iterations; exact from the number of blocks - 1, or if left out."}
    )
    # None is in the union because HfArgumentParser takes `float | str` for a float and could not read a name
    residual: float | str | None = field(
        default="default",
        metadata={
            "help": "Residual map K: 'default', 'identity', 'zero' (fixed-point iteration) or a factor in 0..1."
        },
    )
    blocks: str | None = field(
        default=None, metadata={"help": "Dotted path to the stack of blocks, e.g. model.layers; found if left out."}
    )
    enabled: bool = field(default=True, metadata={"help": "Use Highway-BP in training; off means exact gradients."})

    def __post_init__(self) -> None:
        self.k = check_k(self.k)
        self.residual = check_residual(self.residual)
        if self.blocks is not None and not isinstance(self.blocks, str):
            raise TypeError(f"blocks must be a dotted path such as 'model.layers', or None, got {self.blocks!r}.")
        if self.blocks == "":
            raise ValueError("blocks must be a dotted path such as 'model.layers', or None to find it, got ''.")
        self.enabled = check_enabled(self.enabled)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as a JSON-ready dict that ``from_dict`` reads."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "HighwayConfig":
        """Return the settings saved by ``to_dict``; keys of a newer version are logged and left out.

        Raises:
            TypeError: If a value is of the wrong kind.
            ValueError: If a value is out of range.
        """
        known = {item.name for item in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            logger.warning("HighwayConfig leaves out %s, which a newer version may have saved.", unknown)
        return cls(**{name: value for name, value in values.items() if name in known})
