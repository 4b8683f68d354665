"""The caches of transformers for generation, with mixed values ``U`` where plain values would be.

``Y = A U`` makes chain attention ordinary attention with mixed values, and no later token changes the ``U`` of an
earlier one. So keys and ``U`` are all that a walk needs in order to go on. ``U`` has a row for every query head.

A model calls ``update`` before it attends, when the ``U`` of the new tokens is not known yet. So the newest rows hold
plain values for a moment, and ``commit`` replaces them. A forward pass that ends in between leaves a cache that cannot
be used again, which the next ``update`` says.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from hf_chainattn.errors import UnsupportedCacheError, UnsupportedModelError


class ChainLayer(CacheLayerMixin):
    """What the four kinds of layers have in common.

    Attributes:
        values: ``[B, H, S, E]``, ``U``.
        groups: Query heads of each key head, known from the first forward pass on.
        expected: An attention module that will commit has announced itself.
        waiting: Tokens whose ``U`` is not known yet.
        empty: Nothing was cached before them.
        used: Something was ever committed.
        returned: What ``update`` returned last, until it is committed.
        settings: With which its ``U`` was computed, as far as they are numbers.
    """

    values: Tensor
    groups = 1
    expected = False
    waiting = 0
    empty = False
    used = False
    returned: tuple[Tensor, Tensor] | None = None
    settings: object = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys ``[B, H_kv, C, D]`` and plain values ``[B, H_kv, C, E]``, and return all as the parent does.

        Raises:
            UnsupportedCacheError: If nobody will replace the plain values, or nobody replaced the last ones.
        """
        if not self.expected:
            raise UnsupportedCacheError(
                "This cache holds the mixed values of chain attention, and was handed to a model without it: use a "
                "new cache after a change of attn_implementation."
            )
        if self.waiting:
            raise UnsupportedCacheError(
                "The last forward pass with this cache did not finish, and left plain values in it: use a new cache."
            )
        self.expected, self.waiting, self.empty = False, key_states.shape[-2], self._is_empty(key_states.shape[-2])
        values = value_states.repeat_interleave(self.groups, 1) if self.groups > 1 else value_states
        self.returned = super().update(key_states, values, *args, **kwargs)
        return self.returned

    def check(self, key: Tensor, value: Tensor, settings: object) -> None:
        """Raise unless the module attends to what ``update`` returned, with the settings that the past was made with.

        Some models cache something else, from which they make keys and values, and some repeat it: ``U`` would be
        taken for that.

        Raises:
            UnsupportedModelError: If keys and values are not those of the cache.
            UnsupportedCacheError: If the settings are others.
        """
        if self.returned is None or not all(map(_same, (key, value), self.returned)):
            raise UnsupportedModelError(
                "This model makes its keys and values from what is cached, or shares them between layers, and a cache "
                "cannot hold the mixed values of chain attention for it: use use_cache=False."
            )
        if self.used and settings != self.settings:
            raise UnsupportedCacheError(
                f"This cache was filled with chain attention at {self.settings}, which is {settings} now: use a new "
                "cache after a change of gamma or diagonal."
            )
        self.settings = settings

    def places(self) -> Tensor | None:
        """Return where the new tokens are among the keys that ``update`` returned, ``[C]``; ``None``: at the end."""
        return None

    def widen(self, groups: int) -> None:
        """Make room for a row of ``U`` for every query head. Only a new cache can be asked to.

        Args:
            groups: Query heads of each key head.
        """
        if groups == self.groups:
            return
        if self.used:
            raise UnsupportedCacheError("A cache of chain attention was handed to a model with other heads.")
        self.values = self.values.repeat_interleave(groups // self.groups, 1)
        self.groups = groups

    def commit(self, u: Tensor) -> None:
        """Replace the plain values of the new tokens by ``u``, ``[B, H, C, E]``."""
        self._write(u)
        self.waiting, self.used, self.returned = 0, True, None

    def _write(self, u: Tensor) -> None:
        raise NotImplementedError

    def _is_empty(self, count: int) -> bool:
        """Return whether nothing is cached yet, where ``count`` tokens arrive."""
        return bool(self.get_seq_length() == 0)


def _same(given: Tensor, cached: Tensor) -> bool:
    if given is cached:
        return True
    if given.shape != cached.shape:
        return False
    if torch.compiler.is_compiling() or given.untyped_storage().data_ptr() == cached.untyped_storage().data_ptr():
        return True
    # a model may have copied them; seldom, and then it is looked at
    return torch.equal(given, cached)


class _ChainAtTheEnd(ChainLayer):
    """The newest tokens are the last ones."""

    def _write(self, u: Tensor) -> None:
        # a window may have let go of some of the new tokens already
        count = min(self.waiting, self.values.shape[-2])
        past, u = self.values[:, :, : self.values.shape[-2] - count], u[:, :, u.shape[2] - count :]
        if past.shape[-2] == 0:
            self.values = u
        elif torch.is_grad_enabled():
            # what a graph may have kept is not changed in place
            self.values = torch.cat([past, u], -2)
        else:
            self.values[:, :, self.values.shape[-2] - count :] = u


class _RoomyLayer(DynamicLayer):
    """A dynamic layer with room for more tokens, so that not everything is copied for each: a quarter more than held.

    ``keys`` and ``values`` are views of the beginning of larger tensors. Whatever replaces them by other tensors, as
    a change of beams does, makes new room at the next token.
    """

    keys: Tensor
    values: Tensor
    _rooms: dict[str, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys ``[B, H, C, D]`` and values ``[B, H', C, E]``, and return all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._appended("keys", self.keys, key_states)
        self.values = self._appended("values", self.values, value_states)
        return self.keys, self.values

    def reset(self) -> None:
        """Forget everything, the room too."""
        super().reset()
        self._rooms = None

    def _appended(self, name: str, held: Tensor, new: Tensor) -> Tensor:
        # a prompt as it comes; and nothing that a graph may have kept, or is being traced, is changed in place
        if held.numel() == 0 or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return torch.cat([held, new], dim=-2)
        start, stop = held.shape[-2], held.shape[-2] + new.shape[-2]
        rooms = self._rooms if self._rooms is not None else {}
        room = rooms.get(name)
        if room is None or room.shape[-2] < stop or not _begins(room, held):
            room = held.new_empty(*held.shape[:2], stop + max(stop // 4, 64), held.shape[-1])
            room[:, :, :start] = held
            rooms[name], self._rooms = room, rooms
        room[:, :, start:stop] = new
        return room[:, :, :stop]


def _begins(room: Tensor, held: Tensor) -> bool:
    """Return whether ``held`` is the beginning of ``room``, which may be written to."""
    same = held.data_ptr() == room.data_ptr() and held.stride() == room.stride() and held.shape[:2] == room.shape[:2]
    return same and (not room.is_inference() or torch.is_inference_mode_enabled())


class ChainDynamicLayer(_ChainAtTheEnd, _RoomyLayer):
    """A layer that grows with every token."""


class ChainDynamicSlidingWindowLayer(_ChainAtTheEnd, DynamicSlidingWindowLayer):
    """A layer that grows up to the size of its window."""


class ChainStaticLayer(ChainLayer, StaticLayer):
    """A layer of a fixed size, for compiled decoding."""

    def widen(self, groups: int) -> None:
        """As for any layer; the memory stays at its place once it has the right size."""
        before = self.values
        super().widen(groups)
        if self.values is not before and not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.values)

    def places(self) -> Tensor | None:
        """Return where the new tokens are among all places, ``[C]``."""
        return self._last_places()

    def _last_places(self) -> Tensor:
        # the number of tokens is a tensor, which a compiled graph can change
        first: Tensor = self.cumulative_length - self.waiting
        return torch.arange(self.waiting, device=self.device) + first

    def _write(self, u: Tensor) -> None:
        self.values.index_copy_(2, self._last_places(), u)

    def _is_empty(self, count: int) -> bool:
        # one token is never read as a prompt, so that decoding neither waits for a device nor is compiled twice
        return count > 1 and not torch.compiler.is_compiling() and super()._is_empty(count)


class ChainStaticSlidingWindowLayer(ChainStaticLayer, StaticSlidingWindowLayer):
    """A layer of the size of its window."""

    def places(self) -> Tensor | None:
        """Return where the new tokens are, ``[C]``; ``None`` from when the window is full: at the end."""
        return None if self.cumulative_length_int > self.max_cache_len else self._last_places()

    def _write(self, u: Tensor) -> None:
        if self.cumulative_length_int <= self.max_cache_len:
            super()._write(u)
            return
        count = min(self.waiting, self.max_cache_len)
        self.values[:, :, self.max_cache_len - count :].copy_(u[:, :, u.shape[2] - count :])


_KINDS: dict[type, type[ChainLayer]] = {
    DynamicLayer: ChainDynamicLayer,
    DynamicSlidingWindowLayer: ChainDynamicSlidingWindowLayer,
    StaticLayer: ChainStaticLayer,
    StaticSlidingWindowLayer: ChainStaticSlidingWindowLayer,
}


def chain_layer(cache: Cache, index: int) -> ChainLayer:
    """Return the layer of a cache that an attention module will use, made one for chain attention if need be.

    Args:
        cache: Of any kind; the layer is replaced in it by one with the same contents.
        index: The module's ``layer_idx``.

    Raises:
        UnsupportedCacheError: If the cache or its layer is of a kind that cannot hold ``U``, or was filled without
            chain attention.
    """
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    if getattr(cache, "offloading", False):
        raise UnsupportedCacheError(
            "An offloaded cache leaves the device before the mixed values of new tokens are known: use "
            "cache_implementation='dynamic' or 'static' with chain attention."
        )
    # a cache made without a config appends its layers as they are asked for
    while cache.layer_class_to_replicate is not None and len(cache.layers) <= index:
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[index]
    if isinstance(layer, ChainLayer):
        return layer
    kind = _KINDS.get(type(layer))
    if kind is None:
        raise UnsupportedCacheError(
            f"Chain attention cannot keep its mixed values in a {type(layer).__name__}: use "
            "cache_implementation='dynamic' or 'static', or use_cache=False."
        )
    if layer.is_initialized and bool(layer.get_seq_length() > 0):
        raise UnsupportedCacheError(
            "This cache was filled without chain attention and holds plain values, from which a walk cannot be "
            "continued: use a new cache."
        )
    made = kind.__new__(kind)
    made.__dict__.update(layer.__dict__)
    cache.layers[index] = made
    return made
