"""An oracle for any model: its own eager attention, with a matrix inverse in the place of the product with values.

Nothing here is shared with ``hf_chainattn``. Which attention is self-attention is seen from its matrix: as many keys as
queries.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface

_SOFTMAXES = (torch.nn.functional.softmax, torch.softmax, torch.Tensor.softmax, torch.special.softmax)


class SelfAttention(NamedTuple):
    """A softmax over as many keys as queries.

    Args:
        tokens: How many.
        module: The innermost module in whose forward it is taken; ``None``: in no module's.
    """

    tokens: int
    module: nn.Module | None


class Softmaxes(TorchFunctionMode):
    """Sees every softmax of a model, wherever it stands, and takes it in the dtype of what it is given.

    Eager attention asks for float32, where the mask of a float64 model overflows to nan.

    Attributes:
        found: The self-attentions, in the order of the calls.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[SelfAttention] = []
        self._modules: list[nn.Module] = []
        self._handles: list[Any] = []
        self._paused = False

    def __enter__(self) -> "Softmaxes":
        self._handles = [
            hooks.register_module_forward_pre_hook(lambda module, args: self._modules.append(module)),
            hooks.register_module_forward_hook(lambda module, args, output: self._left(), always_call=True),
        ]
        super().__enter__()
        return self

    def __exit__(self, *reason: Any) -> None:
        super().__exit__(*reason)
        for handle in self._handles:
            handle.remove()

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:  # noqa: ANN401  what the function returns
        kwargs = kwargs or {}
        if self._paused:
            return function(*args, **kwargs)
        if function in _SOFTMAXES:
            kwargs = {name: value for name, value in kwargs.items() if name != "dtype"}
            args = tuple(value for value in args if not isinstance(value, torch.dtype))
            self._note(*(args[0] if args else kwargs["input"]).shape)
        elif function is torch.nn.functional.scaled_dot_product_attention:
            query, key = (args[place] if len(args) > place else kwargs[name] for place, name in enumerate(("query", "key")))
            self._note(*query.shape[:-1], key.shape[-2])
        return function(*args, **kwargs)

    def _note(self, *shape: int) -> None:
        if len(shape) > 2 and shape[-1] == shape[-2] > 1:
            self.found.append(SelfAttention(shape[-1], self.module))

    def _left(self) -> None:
        self._modules.pop()

    @property
    def module(self) -> nn.Module | None:
        """The innermost module that is in its forward."""
        return self._modules[-1] if self._modules else None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """See nothing for a while."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False


class Walks:
    """What stands in the eager path of a model: it counts the walks that it takes in the place of attention.

    Args:
        gamma: Chance of one more hop.
        modules: Attention modules of which self-attention is a walk.
        tokens: Only over so many tokens; ``None``: over any number.

    Attributes:
        count: Walks so far.
    """

    def __init__(self, gamma: float, modules: Collection[nn.Module], tokens: int | None = None) -> None:
        self.gamma, self.modules, self.tokens = gamma, modules, tokens
        self.count = 0

    def around(self, eager: Callable[..., Any]) -> Callable[..., Any]:
        """Return an eager attention function whose output is solved from the weights that it returns."""

        def forward(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
            output, weights = eager(module, query, key, value, *args, **kwargs)
            queries, keys = weights.shape[-2:]
            if module not in self.modules or queries != keys or self.tokens not in (None, keys):
                return output, weights
            self.count += 1
            return self._solved(output, weights, value), weights

        return forward

    def _solved(self, output: Tensor, weights: Tensor, value: Tensor) -> Tensor:
        attention = torch.nan_to_num(weights.double())
        values = value.repeat_interleave(attention.shape[1] // value.shape[1], 1).double()
        identity = torch.eye(attention.shape[-1], dtype=torch.float64)
        inverse = torch.linalg.inv(identity - self.gamma * attention)
        walk = (1 - self.gamma) * attention @ inverse @ values
        return walk.to(output.dtype).transpose(1, 2).reshape(output.shape).contiguous()

    @contextlib.contextmanager
    def in_the_eager_path(self) -> Iterator[None]:
        """Stand where every model looks for its own eager attention."""
        original = AttentionInterface.get_interface

        def get_interface(interface: AttentionInterface, name: str | None, default: Callable[..., Any]) -> Any:
            found = original(interface, name, default)
            return self.around(found) if found is default else found

        AttentionInterface.get_interface = get_interface
        try:
            yield
        finally:
            AttentionInterface.get_interface = original
