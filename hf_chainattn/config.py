"""Settings of chain attention: one dataclass that is the argument, the check and the save format."""

import functools
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch

Diagonal = Literal["kept", "removed"]
# of all layers; of each layer; of each head of each layer
Gamma = float | Sequence[float | Sequence[float]]


@dataclass(frozen=True)
class ChainAttentionConfig:
    """Settings of chain attention, stored under ``chain_attention`` in a model's ``config.json``.

    Args:
        gamma: Chance of one more hop, in ``[0, 1)``; ``1 / (1 - gamma)`` hops in the mean. ``0`` is ordinary
            attention, arXiv 2410.05565 uses 0.9. A number, or a list with an entry for each layer, which is a number
            or a list with one for each head.
        diagonal: ``"kept"`` leaves each token's attention to itself inside the walk, so that outputs stay convex
            mixtures of values and pretrained weights stay usable. ``"removed"`` takes it out of the inverse only.
        layers: Numbers of the layers that chain, from 0; the others are ordinary. ``None``: all.
        encoder: Whether the encoder of an encoder-decoder chains too, which takes a dense solve.
        learnable: Whether gamma is a parameter, for each layer or, with ``per_head``, for each head. It begins at
            ``gamma``, which must not be 0 then, and is saved with the weights.
        per_head: See ``learnable``. Fixed numbers of heads are lists in ``gamma``.

    Raises:
        TypeError: If a value is of the wrong kind.
        ValueError: If a value is outside its range.
    """

    gamma: Gamma = 0.9
    diagonal: Diagonal = "kept"
    layers: Sequence[int] | None = None
    encoder: bool = False
    learnable: bool = False
    per_head: bool = False

    def __post_init__(self) -> None:
        # tuples, and numbers of Python: a NumPy number would not survive the way to JSON
        object.__setattr__(self, "gamma", _checked(self.gamma))
        check_diagonal(self.diagonal)
        if self.layers is not None:
            object.__setattr__(self, "layers", _checked_layers(self.layers))
        for name in ("encoder", "learnable", "per_head"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}.")
        if self.per_head and not self.learnable:
            raise ValueError("per_head=True is for a learnable gamma: give fixed ones as lists, [[...], ...].")
        if self.learnable and not _all_positive(self.gamma):
            raise ValueError(
                f"learnable=True needs a gamma inside (0, 1) to begin with, got {self.gamma!r}: a sigmoid cannot "
                "reach 0, and a gamma learned from near 0 stays there. Raise a fixed one with GammaSchedule instead."
            )

    def of_layer(self, index: int, *, in_encoder: bool = False) -> float | tuple[float, ...]:
        """Return gamma of a layer, or of each of its heads; 0 where the layer is ordinary.

        Args:
            index: Number of the layer, from 0.
            in_encoder: Whether it is one of the encoder of an encoder-decoder.

        Raises:
            ValueError: If gamma is a list without an entry for this layer.
        """
        if (in_encoder and not self.encoder) or (self.layers is not None and index not in self.layers):
            return 0.0
        if isinstance(self.gamma, float):
            return self.gamma
        if index >= len(self.gamma):
            raise ValueError(f"gamma must have an entry for every layer, got {len(self.gamma)} and a layer {index}.")
        entry = self.gamma[index]
        return entry if isinstance(entry, float) else tuple(entry)

    def check_layer(self, number: int, heads: int | None, layers: int | None) -> None:
        """Raise unless what is said of layers and heads fits a model.

        Args:
            number: Of one of its layers.
            heads: Query heads of that layer, if that is known.
            layers: How many layers the model has, if that is known.

        Raises:
            ValueError: If not.
        """
        gamma = self.of_layer(number)
        if isinstance(gamma, tuple) and heads is not None and len(gamma) != heads:
            raise ValueError(f"gamma must have an entry for each of {heads} heads, got {gamma!r} for layer {number}.")
        if layers is None:
            return
        if isinstance(self.gamma, tuple) and len(self.gamma) != layers:
            raise ValueError(f"gamma must have an entry for each of {layers} layers, got {len(self.gamma)}.")
        if self.layers and max(self.layers) >= layers:
            raise ValueError(f"layers must be below {layers}, the number of layers, got {list(self.layers)}.")

    def start_of(self, index: int, heads: int | None, *, in_encoder: bool = False) -> tuple[float, ...] | None:
        """Return what the gate of a layer begins with, one number or one for each head; ``None``: it has no gate."""
        gamma = self.of_layer(index, in_encoder=in_encoder)
        if not self.learnable or gamma == 0.0:
            return None
        if isinstance(gamma, tuple):
            return gamma
        if self.per_head and heads is None:
            raise ValueError(
                f"per_head=True needs the number of heads of layer {index}, which the model does not say."
            )
        return (gamma,) * (heads if self.per_head and heads else 1)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, as it is written to ``config.json``: what is not as by default, gamma and diagonal."""
        values = {field.name: _plain(getattr(self, field.name)) for field in fields(self)}
        usual = {field.name: field.default for field in fields(self)}
        return {key: value for key, value in values.items() if key in ("gamma", "diagonal") or value != usual[key]}

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
        # asked for by every attention module for every token, and checked once; not by a compiler, which checks once
        items = tuple((key, entry, type(entry)) for key, entry in value.items())
        if torch.compiler.is_compiling() or not all(isinstance(entry, int | float | str) for _, entry, _ in items):
            return cls(**value)
        return _from_items(items)


@functools.lru_cache(maxsize=64)
def _from_items(items: tuple[tuple[str, Any, type], ...]) -> ChainAttentionConfig:
    # types are part of the key, because True equals 1
    return ChainAttentionConfig(**{key: entry for key, entry, _ in items})


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


def _checked(gamma: Any, depth: int = 0) -> Any:  # noqa: ANN401  a number, or numbers of layers and heads
    if isinstance(gamma, Sequence) and not isinstance(gamma, str) and depth < 2:
        if len(gamma) == 0:
            raise ValueError("gamma must be a number or a list with an entry for every layer, got an empty one.")
        return tuple(_checked(entry, depth + 1) for entry in gamma)
    check_gamma(gamma)
    return float(gamma)


def _checked_layers(layers: object) -> tuple[int, ...]:
    if isinstance(layers, str) or not isinstance(layers, Sequence):
        raise TypeError(f"layers must be a list of numbers of layers, or None for all, got {layers!r}.")
    if not all(
        isinstance(layer, numbers.Integral) and not isinstance(layer, bool) and int(layer) >= 0 for layer in layers
    ):
        raise ValueError(f"layers must hold whole numbers from 0 on, got {layers!r}.")
    return tuple(int(layer) for layer in layers)


def _all_positive(gamma: Any) -> bool:  # noqa: ANN401  checked
    return all(map(_all_positive, gamma)) if isinstance(gamma, tuple) else gamma > 0


def _plain(value: Any) -> Any:  # noqa: ANN401  what JSON knows
    return [_plain(entry) for entry in value] if isinstance(value, tuple) else value
