"""The forward that Highway-BP puts on a block, at the level of the instance, as accelerate's hooks do."""

import copy
import functools

from torch import nn

from hf_highwaybp.engine import Engine
from hf_highwaybp.errors import AttachError

# where accelerate keeps the forward that its own hook wraps
SLOTS = ("forward", "_old_forward")


class BlockForward:
    """Callable that takes the place of ``block.forward`` until it is removed.

    A copy or a pickle of the model gets the block's plain forward, bound to the copied block.

    Args:
        engine: Records the calls.
        index: Index of the block in the engine's stack.
        block: The block.
    """

    def __init__(self, engine: Engine, index: int, block: nn.Module) -> None:
        self.engine: Engine | None = engine
        self.index, self.block = index, block
        self.had_own = "forward" in block.__dict__
        self.original = block.forward
        # gives the signature of the block's forward to those who ask
        functools.update_wrapper(self, self.original)

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Run the block on the engine's tape, or plainly once the override is removed."""
        if self.engine is None:
            return self.original(*args, **kwargs)
        return self.engine.call(self.index, self.original, args, kwargs)

    def remove(self) -> None:
        """Give the block its forward back; a wrapper of somebody else that holds this object then only passes on."""
        self.engine = None
        slots = self.block.__dict__
        if slots.get("_old_forward") is self:
            slots["_old_forward"] = self.original
        if slots.get("forward") is self:
            if self.had_own:
                self.block.forward = self.original
            else:
                del slots["forward"]

    def __deepcopy__(self, memo: dict[int, object]) -> object:
        return copy.deepcopy(self.original, memo)

    def __reduce__(self) -> tuple[object, ...]:
        if self.had_own:
            return (_same, (self.original,))
        # read before the copied block has its state, this is the forward of its class
        return (getattr, (self.block, "forward"))


def _same(forward: object) -> object:
    return forward


def put_on(engine: Engine) -> list[BlockForward]:
    """Return the overrides of all blocks of the engine's stack, after putting them in place.

    Raises:
        AttachError: If a block already belongs to an engine; no block is changed then.
    """
    for name, block in zip(engine.stack.names, engine.stack.blocks, strict=True):
        if any(isinstance(block.__dict__.get(slot), BlockForward) for slot in SLOTS):
            raise AttachError(f"Block {name!r} already belongs to a HighwayBP: detach that one first.")
    overrides = []
    for index, block in enumerate(engine.stack.blocks):
        if not isinstance(block.__dict__.get("forward"), BlockForward):
            override = BlockForward(engine, index, block)
            block.forward = override
            overrides.append(override)
    return overrides
