"""The nodes that Highway-BP puts into the autograd graph of the model.

In the graph that the user differentiates, every block call is one ``Gate``. Each gate hangs on the gate before it and
the first on a chain of ``Entry`` nodes, so the chain runs after all gates: torch runs a node whose gradient is not
defined as it runs any other. The block's own, local graph begins at a ``StreamLeaf``, which no backward pass of the
user may reach.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from hf_highwaybp.errors import BackwardError, EscapedTensorError

if TYPE_CHECKING:
    from hf_highwaybp.tape import Tape

Gradients = tuple[Tensor | None, ...]


class TapeContext(FunctionCtx):
    """What the nodes of a tape carry; ``origin`` tells the walk over a local graph where a tensor comes from."""

    tape: "Tape"
    index: int | None
    origin: str
    below: Tensor | None


class LeafContext(FunctionCtx):
    """What a leaf of a local graph carries."""

    guard: "Guard"
    block: str
    origin: str


class Guard:
    """Shared by a tape and its leaves: whether the backward pass under way is one of the tape's own.

    It is apart from the tape because a leaf that held its tape would be a reference cycle through torch's graph, which
    Python's garbage collector cannot see.
    """

    def __init__(self) -> None:
        self.own_pass = False


def _token(tensors: tuple[Tensor, ...]) -> Tensor:
    # the least a tensor can be and still carry a graph edge
    return torch.empty(0, device=tensors[0].device)


class Entry(torch.autograd.Function):
    """Brings gradients into the model: those of one block's parameters, or of the inputs of the stack."""

    @staticmethod
    def forward(ctx: TapeContext, tape: "Tape", index: int | None, token: Tensor | None, *tensors: Tensor) -> Tensor:
        """Return a token ``[0]``; ``index`` is the block whose parameters ``tensors`` are, ``None`` for the inputs."""
        ctx.set_materialize_grads(False)
        ctx.tape, ctx.index, ctx.origin = tape, index, "the model below the stack"
        return _token(tensors)

    @staticmethod
    def backward(ctx: TapeContext, token: Tensor | None) -> Gradients:
        """Return the gradients of the tensors; the first entry that runs starts the iteration."""
        gradients = ctx.tape.input_gradients() if ctx.index is None else ctx.tape.parameter_gradients(ctx.index)
        return (None, None, None, *gradients)


class Gate(torch.autograd.Function):
    """Stands for one block call in the user's graph: passes the outputs on, and keeps their cotangents."""

    @staticmethod
    def forward(ctx: TapeContext, tape: "Tape", index: int, below: Tensor, *outputs: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs of segment ``index``, each ``[...]``; ``below`` is the gate or entry that runs next."""
        ctx.set_materialize_grads(False)
        ctx.tape, ctx.index = tape, index
        ctx.origin = f"an output of block {tape.segments[index].name!r}"
        # a hook on the stream lives on in the graph when Python drops the tensor: held here, it can still be seen
        ctx.below = below
        # the outputs are plain aliases that nobody else holds: a view could not be changed in place after the stack
        ctx.mark_dirty(*outputs)
        return outputs

    @staticmethod
    def backward(ctx: TapeContext, *cotangents: Tensor | None) -> Gradients:
        """Keep the cotangents, each ``[...]`` of its output, and return nothing: the tape solves for the rest.

        Raises:
            BackwardError: If the user asked for a graph of this backward pass, or hooked the stream below this block.
        """
        if torch.is_grad_enabled():
            raise BackwardError(
                "Highway-BP gradients cannot be differentiated again: call it without create_graph=True."
            )
        if ctx.index is not None:
            # this gate runs before the hooks of the one below it, and only if that one is not the last that is read
            if ctx.index > 0 and ctx.below is not None:
                ctx.tape.refuse_hooks(ctx.index - 1, ctx.below)
            ctx.below = None
            ctx.tape.receive(ctx.index, cotangents)
        return (None, None, None, *(None for _ in cotangents))


class Origin(torch.autograd.Function):
    """Ties the local graphs to everything below the stack without being part of any gradient.

    A backward pass that asks for any tensor below a block then also visits that block's ``StreamLeaf``, if it
    reached the local graph at all: ``torch.autograd.grad`` runs only nodes that lead to what it was asked for.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, *tensors: Tensor) -> Tensor:
        """Return a token ``[0]`` that depends on ``tensors``, each ``[...]``."""
        ctx.set_materialize_grads(False)
        return _token(tensors)

    @staticmethod
    def backward(ctx: FunctionCtx, token: Tensor | None) -> Gradients:
        """Return nothing: the leaf on the way here lets only the tape's own passes through."""
        return tuple(None for _ in ctx.needs_input_grad)  # type: ignore[attr-defined]


class StreamLeaf(torch.autograd.Function):
    """Input of a local graph: a leaf for the tape's own VJPs, a tripwire for every other backward pass."""

    @staticmethod
    def forward(ctx: LeafContext, guard: Guard, name: str, origin: Tensor, value: Tensor) -> Tensor:
        """Return ``value``, ``[...]``, cut from the graph that made it; ``name`` is the block it enters."""
        ctx.set_materialize_grads(False)
        ctx.guard, ctx.block, ctx.origin = guard, name, f"a tensor made inside block {name!r}"
        return value.view_as(value)

    @staticmethod
    def backward(ctx: LeafContext, cotangent: Tensor | None) -> Gradients:
        """Return nothing in a pass of the tape, and raise in any other.

        Raises:
            EscapedTensorError: If the loss depends on a tensor that left the block by another way than its outputs.
        """
        if not ctx.guard.own_pass:
            raise EscapedTensorError(
                f"The loss depends on a tensor made inside block {ctx.block!r} that is not one of its outputs (a "
                "key/value cache, attention weights, router logits), so its gradient would be wrong. Leave that "
                "tensor out of the loss or detach it, or train without Highway-BP."
            )
        return (None, None, None, None)
