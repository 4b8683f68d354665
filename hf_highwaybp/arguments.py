"""The arguments of one block call: which is the stream, and which are side inputs that need a gradient."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from hf_highwaybp.errors import UnsupportedModelError


def parameter_names(forward: Callable[..., object]) -> tuple[str, ...]:
    """Return the names of the parameters of a block's forward, the stream's first."""
    return tuple(inspect.signature(forward).parameters)


@dataclass(frozen=True)
class BlockArguments:
    """Arguments of a block call.

    Attributes:
        names: Parameter names of the block's forward.
        args: Positional arguments.
        kwargs: Keyword arguments.
    """

    names: tuple[str, ...]
    args: tuple[object, ...]
    kwargs: Mapping[str, object]

    def stream(self, block: str) -> Tensor:
        """Return the stream, ``[...]``: the first argument.

        Raises:
            UnsupportedModelError: If it is not a floating point tensor.
        """
        stream = self.args[0] if self.args else self.kwargs.get(self.names[0]) if self.names else None
        if not isinstance(stream, Tensor) or not stream.is_floating_point():
            raise UnsupportedModelError(
                f"Block {block!r} must take the residual stream, a floating point tensor, as its first argument "
                f"{self.names[:1]}, and got {type(stream).__name__}. Name other blocks with blocks=..."
            )
        return stream

    def named(self) -> Iterator[tuple[str, object]]:
        """Yield name and value of every argument but the stream."""
        for position, value in enumerate(self.args[1:], 1):
            yield self.names[position] if position < len(self.names) else f"argument {position}", value
        for name, value in self.kwargs.items():
            if self.args or name != self.names[0]:
                yield name, value

    def side_inputs(self) -> list[tuple[str, Tensor]]:
        """Return name and tensor, ``[...]``, of all differentiable arguments but the stream.

        Only arguments and tuples are looked into: what a block finds in a dict, a list or an object can change while
        the stack runs, and is left to the walk over the block's graph.
        """
        return [found for name, value in self.named() for found in _differentiable(name, value)]

    def replaced(self, stream: Tensor, leaves: Mapping[int, Tensor]) -> tuple[tuple[object, ...], dict[str, object]]:
        """Return args and kwargs with ``stream``, ``[...]``, and side inputs exchanged by the ids of ``leaves``."""
        if self.args:
            args = (stream, *(_replaced(value, leaves) for value in self.args[1:]))
            return args, {name: _replaced(value, leaves) for name, value in self.kwargs.items()}
        kwargs = {name: _replaced(value, leaves) for name, value in self.kwargs.items()}
        return (), {**kwargs, self.names[0]: stream}


def _differentiable(name: str, value: object) -> list[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        return [(name, value)] if value.requires_grad else []
    if type(value) is tuple:
        return [found for index, item in enumerate(value) for found in _differentiable(f"{name}[{index}]", item)]
    return []


def _replaced(value: object, leaves: Mapping[int, Tensor]) -> object:
    if isinstance(value, Tensor):
        return leaves.get(id(value), value)
    # a tuple without a side input stays the object it was
    if type(value) is tuple and _differentiable("", value):
        return tuple(_replaced(item, leaves) for item in value)
    return value
