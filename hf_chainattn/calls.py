"""What the attention function must know of the call of its attention module, and is not handed: two hooks find it."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import Cache

from hf_chainattn.cache import ChainLayer, chain_layer
from hf_chainattn.errors import UnsupportedModelError
from hf_chainattn.parts import uses_chain

# where a module keeps which layer it is, and who looks on; and while a call lasts, what is known of it and whether it
# attended yet
_PLACE, _OBSERVER = "_chain_place", "_chain_observer"
_CALL, _ATTENDED = "_chain_call", "_chain_attended"

# a value for a parameter of one of these names makes the call cross-attention, which is never a chain
_CROSS_ATTENTION = ("key_value_states", "encoder_hidden_states", "cross_attention_states")
# under one of these, keys or values come from other tokens than the queries in a way that is not known here
_FOREIGN_KEYS = (
    "key_hidden_states",
    "value_hidden_states",
    "value_embeds",
    "context",
    "context_hidden_states",
    "shared_kv_states",
)

# modules that make their mask from the values of the cache, which are mixed here
_VALUE_READERS = ("DogeAttention",)


class Place(NamedTuple):
    """What an attention module is to its model, found once because a compiler cannot look for it.

    Args:
        number: Which layer, from 0.
        in_encoder: Whether it is one of an encoder-decoder's encoder.
        parameters: Of its forward, in order.
        heads: How many query heads it has; ``None`` until its model is complete.
    """

    number: int
    in_encoder: bool
    parameters: tuple[str, ...]
    heads: int | None = None


class Call(NamedTuple):
    """What the attention function must know of the call of its module, and is not handed.

    Args:
        crosses: Keys come from other tokens than queries.
        layer: The layer of the cache, if there is one.
        place: Which layer of the model the module is.
    """

    crosses: bool
    layer: ChainLayer | None
    place: Place


def call_of(module: nn.Module) -> Call | None:
    """Return the call that an attention module is in; ``None`` if the module belongs to no prepared model."""
    call: Call | None = module.__dict__.get(_CALL)
    return call


def note_attention(module: nn.Module) -> None:
    """Note that a module has called its attention function: one that does not would be ordinary without a sign."""
    module.__dict__[_ATTENDED] = True


def place_of(module: nn.Module) -> Place | None:
    """Return which layer a watched attention module is, else ``None``."""
    place: Place | None = module.__dict__.get(_PLACE)
    return place


def set_place(module: nn.Module, place: Place) -> None:
    """Tell a watched attention module which layer it is."""
    module.__dict__[_PLACE] = place


def observe(module: nn.Module, observer: Callable[..., None] | None) -> None:
    """Let ``observer`` be called at every self-attention of a module, or with ``None`` no longer; see ``show``."""
    if observer is None:
        module.__dict__.pop(_OBSERVER, None)
    else:
        module.__dict__[_OBSERVER] = observer


def show(module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, **settings: Any) -> None:
    """Hand what a module is about to attend with to its observer, if it has one.

    Args:
        module: The attention module.
        query: ``[B, H, C, D]``.
        key: ``[B, H_kv, K, D]``.
        mask: Boolean or additive, broadcastable to ``[B, H, C, K]``; ``None``: everything is visible.
        settings: ``gamma``, ``diagonal``, ``scale`` and ``softcap`` as for ``mixing_matrix``.
    """
    if (observer := module.__dict__.get(_OBSERVER)) is not None:
        observer(module, module.__dict__[_PLACE], query, key, mask, **settings)


def watch(module: nn.Module, position: int) -> None:
    """Put the hooks on an attention module, once. Its number is its ``layer_idx``, or ``position`` if it has none."""
    if _begin not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(_begin, with_kwargs=True)
        module.register_forward_hook(_end, always_call=True)
    index, names = getattr(module, "layer_idx", None), inspect.signature(type(module).forward).parameters
    set_place(module, Place(position if index is None else index, False, tuple(names)[1:]))


def unwatch(module: nn.Module) -> None:
    """Take the hooks off an attention module, if it has them."""
    # by identity and not by a kept handle: a deep copy of the model has the hook, but no handle to it
    for number in [n for n, hook in module._forward_pre_hooks.items() if hook is _begin]:
        del module._forward_pre_hooks[number]
        module._forward_pre_hooks_with_kwargs.pop(number, None)
    for number in [n for n, hook in module._forward_hooks.items() if hook is _end]:
        del module._forward_hooks[number]
        module._forward_hooks_always_called.pop(number, None)
    module.__dict__.pop(_PLACE, None)


def _begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook: see where keys come from, and make the layer of the cache ready for ``U``."""
    place: Place = module.__dict__[_PLACE]
    given = dict(zip(place.parameters, args, strict=False)) | kwargs
    for name in _FOREIGN_KEYS:
        # an empty dict stands for "nothing shared"
        if given.get(name) is not None and given[name] != {}:
            raise UnsupportedModelError(
                f"{type(module).__name__} was called with {name}: its keys are not its queries' tokens, and no chain "
                "exists across them. Use attn_implementation='sdpa' for a model with shared keys."
            )
    # what only passes through a module's **kwargs is not read by it
    read = [name for name in _CROSS_ATTENTION if name in place.parameters]
    crosses, layer = any(given.get(name) is not None for name in read), None
    # by type: the name differs between models
    cache = next((value for value in given.values() if isinstance(value, Cache)), None)
    if cache is not None and not crosses:
        index = getattr(module, "layer_idx", None)
        if index is None:
            raise UnsupportedModelError(
                f"{type(module).__name__} has no layer_idx, so that its layer of the cache is not known: use "
                "use_cache=False."
            )
        if type(module).__name__ in _VALUE_READERS:
            raise UnsupportedModelError(
                f"{type(module).__name__} reads the values of its cache for its mask, and a cache of chain attention "
                "holds others: use use_cache=False."
            )
        layer = chain_layer(cache, index)
        layer.expected = True
    module.__dict__[_CALL] = Call(crosses, layer, place)


def _end(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:  # noqa: ANN401
    """Forward hook, called after errors too: a module that kept the cache would keep its memory, and not be copied."""
    call, attended = module.__dict__.pop(_CALL, None), module.__dict__.pop(_ATTENDED, False)
    if output is not None and not attended and uses_chain(module.config):
        raise UnsupportedModelError(
            f"The forward of {type(module).__name__} did not call its attention function, and gave something else "
            "than chain attention: undo what has replaced it, or use attn_implementation='sdpa'."
        )
    if call is None or call.layer is None:
        return
    call.layer.expected = False
    if output is not None and call.layer.waiting:
        raise UnsupportedModelError(
            f"{type(module).__name__} put values into its cache and did not call its attention function: use "
            "use_cache=False with chain attention here."
        )
