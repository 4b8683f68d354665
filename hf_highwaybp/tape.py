"""One forward pass through the stack, and the solution of its backward pass.

Segments are counted ``0 .. n - 1`` in the order of the block calls. ``w[i]`` is the cotangent of the stream output of
segment ``i``, ``b[i]`` its external part (what arrives from outside the stack), ``F[i]`` the full VJP of segment ``i``
and ``K[i]`` its residual map.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hf_highwaybp.errors import BackwardError
from hf_highwaybp.nodes import Entry, Guard, Origin, StreamLeaf
from hf_highwaybp.residual import ResidualChoice
from hf_highwaybp.stats import PassLog, total_norm


@dataclass
class Segment:
    """One block call: its local graph from ``leaf`` to ``outputs``, and the cotangents that arrived.

    Attributes:
        name: Name of the block.
        block: Index of the block in the stack.
        leaf: Stream input of the local graph, ``[...]``.
        outputs: Differentiable outputs, each ``[...]``; the first is the stream, of the shape of ``leaf``.
        external: Cotangents of the outputs, ``None`` where none arrived.
    """

    name: str
    block: int
    leaf: Tensor
    outputs: list[Tensor]
    external: list[Tensor | None] = field(default_factory=list)


@contextlib.contextmanager
def _hooks_lifted(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Take the gradient hooks off leaves: they belong to the user's pass, which runs them on the final gradient."""
    lifted = [(tensor, tensor._backward_hooks) for tensor in tensors if tensor.is_leaf and tensor._backward_hooks]
    try:
        for tensor, _ in lifted:
            tensor._backward_hooks = None
        yield
    finally:
        for tensor, hooks in lifted:
            # the same dict goes back, so that the handles of the hooks still remove them
            tensor._backward_hooks = hooks


def _add(total: Tensor | None, term: Tensor | None) -> Tensor | None:
    if total is None or term is None:
        return term if total is None else total
    return total + term


class Tape:
    """The local graphs of one forward pass, solved once by the first ``Entry`` node that runs.

    Args:
        blocks: The blocks of the stack; a forward pass belongs to the tape with the same tuple.
        k: Iterations; ``None`` for exact backpropagation.
        residual: The residual maps.
        stream: Input of the stack, ``[...]``.
        sides: Differentiable tensors of the user's graph that the blocks read beside the stream, each ``[...]``.
        on_solved: Receives the account of the backward pass when it starts.
    """

    def __init__(
        self,
        blocks: tuple[nn.Module, ...],
        k: int | None,
        residual: ResidualChoice,
        stream: Tensor,
        sides: list[Tensor],
        on_solved: Callable[[PassLog], None],
    ) -> None:
        self.blocks, self.k, self.residual, self.on_solved = blocks, k, residual, on_solved
        self.parameters = [[p for p in block.parameters() if p.requires_grad] for block in blocks]
        self.segments: list[Segment] = []
        self._origin: Tensor = Origin.apply(stream, *sides, *(p for own in self.parameters for p in own))
        self._guard = Guard()
        self.side_leaves = {id(side): self.leaf("side input", side) for side in sides}
        # a side input must outlive its id
        self._sides = sides
        self.log = PassLog()
        self._wants_input = stream.requires_grad
        self._solved = False
        # segments whose last pass is still to come
        self._open: list[int] = []
        self._cotangents: list[Tensor] = []
        self._gradients: dict[int, list[Tensor | None]] = {}
        self._side_gradients: list[Tensor | None] = [None] * len(sides)
        self._input_gradient: Tensor | None = None

    def entry(self, stream: Tensor) -> Tensor:
        """Return the token of the chain of entries for the stack's input ``stream``, ``[...]``.

        The tape does not keep it: a token leads through its graph to the tape, and the cycle would never be freed.
        """
        token: Tensor = Entry.apply(self, None, None, stream, *self._sides)
        for index, own in enumerate(self.parameters):
            if own:
                token = Entry.apply(self, index, token, *own)
        return token

    def leaf(self, name: str, value: Tensor) -> Tensor:
        """Return ``value``, ``[...]``, as a leaf of the local graph of block ``name``."""
        leaf: Tensor = StreamLeaf.apply(self._guard, name, self._origin, value.detach())
        return leaf

    def receive(self, index: int, cotangents: tuple[Tensor | None, ...]) -> None:
        """Keep what arrived at the outputs of segment ``index``, each ``[...]`` or ``None``.

        Raises:
            BackwardError: If this forward pass was differentiated before.
        """
        if self._solved:
            raise BackwardError(
                "Highway-BP serves one backward pass per forward pass, and this is the second: "
                "add the losses and call backward once, or run the forward pass again."
            )
        self.segments[index].external = list(cotangents)

    def parameter_gradients(self, block: int) -> list[Tensor | None]:
        """Return the gradient of every trainable parameter of a block, in the order of ``parameters``."""
        self._solve()
        self._finish([i for i in self._open if self.segments[i].block == block])
        return self._gradients.pop(block, [None] * len(self.parameters[block]))

    def input_gradients(self) -> list[Tensor | None]:
        """Return the gradient of the stack's input, ``[...]``, and of every side input."""
        self._solve()
        self._finish(list(self._open) if self.log.exact or self._sides else self._open[:1])
        return [self._input_gradient, *self._side_gradients]

    def _solve(self) -> None:
        """Turn external parts into cotangents, once; an exact pass leaves that to the parameter passes."""
        if self._solved:
            return
        self._solved = True
        # blocks above the last one that the loss depends on take no part
        reached = [i for i, segment in enumerate(self.segments) if any(c is not None for c in segment.external)]
        count = 1 + max(reached, default=-1)
        self._open = list(range(count))
        for segment in self.segments[:count]:
            segment.external = segment.external or [None] * len(segment.outputs)
        self._cotangents = [self._external(segment) for segment in self.segments[:count]]
        needed = max(count - 1, 0)
        k = needed if self.k is None else min(self.k, needed)
        self.log = PassLog(k=k, exact=k == needed, blocks=count)
        if not self.log.exact:
            self._iterate(k)
        self.on_solved(self.log)

    def refuse_hooks(self, index: int, stream: Tensor) -> None:
        """Refuse hooks on the stream output of segment ``index``, ``[...]``: they would see the external part only.

        Raises:
            BackwardError: If there is one.
        """
        if stream.retains_grad or stream._backward_hooks:
            raise BackwardError(
                f"The output of block {self.segments[index].name!r} has a gradient hook or retain_grad(), and "
                "Highway-BP knows the gradients of parameters and of the stack's inputs only: take the hook off."
            )

    @staticmethod
    def _external(segment: Segment) -> Tensor:
        arrived = segment.external[0]
        # low precision streams are solved in float32
        dtype = torch.promote_types(segment.leaf.dtype, torch.float32)
        return torch.zeros_like(segment.outputs[0], dtype=dtype) if arrived is None else arrived.to(dtype)

    def _iterate(self, k: int) -> None:
        """Run ``k`` iterations of residual correction on the cotangents.

        Iteration ``t`` leaves the last ``t`` VJPs out: what they start from no longer changes.
        """
        w, count = self._cotangents, len(self._cotangents)
        external = list(w)
        for i in range(count - 1, 0, -1):
            w[i - 1] = external[i - 1] + self.residual.apply(self.segments[i].block, w[i])
        for t in range(1, k + 1):
            products = {i: self._input_vjp(i) for i in range(1, count - t + 1)}
            update: Tensor | None = None
            updates: list[Tensor] = []
            for i in range(count - t, 0, -1):
                error = external[i - 1] + products.pop(i) - w[i - 1]
                carried = None if update is None else self.residual.apply(self.segments[i].block, update)
                update = error if carried is None else error + carried
                updates.append(update)
                w[i - 1] = w[i - 1] + update
            self.log.updates.append(total_norm(updates))
        self.log.cotangent = total_norm(w)

    def _input_vjp(self, index: int) -> Tensor:
        segment, w = self.segments[index], self._cotangents[index]
        (product,) = self._vjp(segment, w, [segment.leaf], keep=True)
        return torch.zeros_like(w) if product is None else product.to(w.dtype)

    def _vjp(
        self, segment: Segment, cotangent: Tensor, inputs: Sequence[Tensor], *, keep: bool
    ) -> tuple[Tensor | None, ...]:
        """Return the VJP of one segment with a cotangent of its stream, ``[...]``, and those of its other outputs.

        One gradient for each input comes back, ``None`` where the outputs do not depend on it; ``keep`` says whether
        the local graph is needed again.
        """
        self.log.vjps += 1
        outputs, cotangents = [segment.outputs[0]], [cotangent.to(segment.outputs[0].dtype)]
        for output, extra in zip(segment.outputs[1:], segment.external[1:], strict=True):
            if extra is not None:
                outputs.append(output)
                cotangents.append(extra)
        self._guard.own_pass = True
        try:
            with _hooks_lifted(inputs):
                return torch.autograd.grad(outputs, inputs, cotangents, retain_graph=keep, allow_unused=True)
        finally:
            self._guard.own_pass = False

    def _finish(self, wanted: list[int]) -> None:
        """Run the last pass of the wanted segments; an exact pass must come down to them from the top."""
        if not wanted:
            return
        indices = [i for i in self._open if i >= min(wanted)] if self.log.exact else wanted
        for index in sorted(indices, reverse=True):
            self._last_pass(index)
            self._open.remove(index)

    def _last_pass(self, index: int) -> None:
        """Differentiate one segment for its parameters, its side inputs and, where needed, its stream input."""
        segment, w = self.segments[index], self._cotangents[index]
        parameters, leaves = self.parameters[segment.block], list(self.side_leaves.values())
        wants_stream = self._wants_input if index == 0 else self.log.exact
        inputs = [*parameters, *leaves, *([segment.leaf] if wants_stream else [])]
        if not inputs:
            return
        gradients = list(self._vjp(segment, w, inputs, keep=False))
        if wants_stream:
            self._pass_down(index, gradients.pop())
        before = self._gradients.get(segment.block, [None] * len(parameters))
        self._gradients[segment.block] = [_add(a, b) for a, b in zip(before, gradients, strict=False)]
        self._side_gradients = [
            _add(a, b) for a, b in zip(self._side_gradients, gradients[len(parameters) :], strict=True)
        ]
        # frees the local graph: what is left of it is the user's business
        segment.outputs = []

    def _pass_down(self, index: int, product: Tensor | None) -> None:
        if index == 0:
            self._input_gradient = product
        elif product is not None:
            below = self._cotangents[index - 1]
            self._cotangents[index - 1] = below + product.to(below.dtype)
