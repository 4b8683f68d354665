"""Settings of chain attention: one dataclass that is the argument, the check and the save format."""

import numbers
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

Diagonal = Literal["kept", "removed"]


@dataclass(frozen=True)
class ChainAttentionConfig:
    """Settings of chain attention, stored under ``chain_attention`` in a model's ``config.json``.

    Args:
        gamma: Chance of one more hop, in ``[0, 1)``; ``1 / (1 - gamma)`` hops in the mean. ``0`` is ordinary
            attention, arXiv 2410.05565 uses 0.9.
        diagonal: ``"kept"`` leaves each token's attention to itself inside the walk, so that outputs stay convex
            mixtures of values and pretrained weights stay usable. ``"removed"`` takes it out of the inverse only.

    Raises:
        TypeError: If ``gamma`` is not a number.
        ValueError: If ``gamma`` or ``diagonal`` is outside its range.
    """

    gamma: float = 0.9
    diagonal: Diagonal = "kept"

    def __post_init__(self) -> None:
        check_gamma(self.gamma)
        check_diagonal(self.diagonal)
        # a NumPy number would not survive the way to JSON
        object.__setattr__(self, "gamma", float(self.gamma))

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, as it is written to ``config.json``."""
        return asdict(self)

    @classmethod
    def from_value(cls, value: "ChainAttentionConfig | Mapping[str, Any] | None") -> "ChainAttentionConfig":
        """Return the settings that ``model.config.chain_attention`` stands for; ``None`` means the defaults.

        Raises:
            TypeError: If ``value`` is neither of the three.
            ValueError: If a key is unknown or a value is out of range.
        """
        if value is None:
            return cls()
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise TypeError(
                f"config.chain_attention must be a dict such as {{'gamma': 0.9, 'diagonal': 'kept'}}, got {value!r}."
            )
        if unknown := sorted(map(str, set(value) - _KEYS)):
            # unlike a library's own defaults, an unread setting here would change every output without a sign
            raise ValueError(
                f"config.chain_attention may hold {sorted(_KEYS)}, got the unknown {unknown}: remove them, or update "
                "hf-chain-highway-certify if a newer version wrote this config."
            )
        return cls(**value)


# taken once: the compiler cannot trace dataclasses.fields
_KEYS = frozenset(field.name for field in fields(ChainAttentionConfig))


def check_gamma(gamma: object) -> None:
    """Raise unless ``gamma`` is a number in ``[0, 1)``."""
    if isinstance(gamma, bool) or not isinstance(gamma, numbers.Real):
        raise TypeError(f"gamma must be a number in [0, 1), got {gamma!r}.")
    if not 0.0 <= float(gamma) < 1.0:
        raise ValueError(f"gamma must be in [0, 1), got {gamma!r}: at 1 the walk never stops and I - A is singular.")


def check_diagonal(diagonal: object) -> None:
    """Raise unless ``diagonal`` names one of the two conventions."""
    if diagonal not in get_args(Diagonal):
        raise ValueError(f"diagonal must be one of {list(get_args(Diagonal))}, got {diagonal!r}.")
