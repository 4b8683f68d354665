"""Recording: runs each block call on its own local graph and hangs it into the user's graph."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.autograd.graph import Node
from torch.utils import _pytree as pytree

from hf_highwaybp.arguments import BlockArguments, parameter_names
from hf_highwaybp.closure import COMPILED, differentiable_tensors, foreign_source, reachable
from hf_highwaybp.errors import EscapedTensorError, UnsupportedModelError
from hf_highwaybp.nodes import Gate
from hf_highwaybp.residual import ResidualChoice
from hf_highwaybp.stacks import Stack
from hf_highwaybp.stats import PassLog
from hf_highwaybp.tape import Segment, Tape

Forward = Callable[..., object]

# how torch words the refusal of a change to a view that a custom function returned
IN_PLACE = "is a view and is being modified inplace"


class Engine:
    """Records block calls on tapes. A tape lives as long as the user's graph that it belongs to.

    Args:
        stack: The blocks.
        k: Iterations, ``None`` for exact; may be changed between forward passes.
        residual: The residual maps.
    """

    def __init__(self, stack: Stack, k: int | None, residual: ResidualChoice) -> None:
        self.stack, self.k, self.residual = stack, k, residual
        self.enabled = True
        self.last_pass: PassLog | None = None
        self._parameter_names = [parameter_names(block.forward) for block in stack.blocks]

    def call(self, index: int, forward: Forward, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        """Run block ``index`` and return its output with every differentiable tensor gated.

        Args:
            index: Index of the block in the stack.
            forward: The block's own forward.
            args: Its positional arguments.
            kwargs: Its keyword arguments.

        Returns:
            What ``forward`` returns.

        Raises:
            UnsupportedModelError: If the block does not fit into a residual stack.
            EscapedTensorError: If it reads a differentiable tensor around the stream.
        """
        block = self.stack.blocks[index]
        if not (self.enabled and block.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        if torch.compiler.is_compiling():
            raise UnsupportedModelError(COMPILED.format(name=self.stack.names[index]))
        arguments = BlockArguments(self._parameter_names[index], args, kwargs)
        stream, sides = arguments.stream(self.stack.names[index]), arguments.side_inputs()
        trained = any(parameter.requires_grad for parameter in block.parameters())
        if not (trained or stream.requires_grad or sides):
            # frozen blocks below the first trained one have no gradient to approximate
            return forward(*args, **kwargs)
        # a gate hangs on the one before, the first on the entries
        tape, below = self._running_tape(index, stream), stream
        if tape is None:
            unique = {id(tensor): tensor for _, tensor in sides}
            self._check_below(index, [stream, *unique.values()])
            tape = Tape(self.stack.blocks, self.k, self.residual, stream, list(unique.values()), self._keep)
            below = tape.entry(stream)
        self._check_sides(index, tape, sides)
        return self._record(index, tape, below, forward, arguments)

    def _keep(self, log: PassLog) -> None:
        self.last_pass = log

    def _tape_of(self, node: Node | None) -> Tape | None:
        tape = getattr(node, "tape", None)
        return tape if isinstance(tape, Tape) and tape.blocks is self.stack.blocks else None

    def _running_tape(self, index: int, stream: Tensor) -> Tape | None:
        """Return the tape whose last output is ``stream``, ``[...]``; ``None`` if a forward pass begins here."""
        node = stream.grad_fn
        tape = self._tape_of(node)
        # the node is compared, not the tensor: after an operation in place the tensor is the same and the node is not
        if tape is not None and getattr(node, "index", None) == len(tape.segments) - 1 and stream.output_nr == 0:
            return tape
        if index == 0 or not self._reaches_gate(node):
            return None
        raise UnsupportedModelError(
            f"Block {self.stack.names[index]!r} does not read the output of the block before it as it is: something "
            "changes, copies or hooks the stream between them, or the block before is in eval mode or Highway-BP's "
            "forward was removed from it. Name one unbroken stretch of blocks with blocks=[...], or train without "
            "Highway-BP."
        )

    def _reaches_gate(self, node: Node | None) -> bool:
        return any(self._tape_of(found) is not None for found in reachable([] if node is None else [node]))

    def _check_below(self, index: int, inputs: list[Tensor]) -> None:
        """Refuse a stack whose own passes would lead into the model below it: torch finds every way to a parameter."""
        # parameters may come and go between forward passes, adapters for example
        owned = {
            id(parameter): f"{name}.{inner}"
            for name, block in zip(self.stack.names, self.stack.blocks, strict=True)
            for inner, parameter in block.named_parameters()
        }
        for node in reachable([tensor.grad_fn for tensor in inputs if tensor.grad_fn is not None]):
            if self._tape_of(node) is not None:
                raise UnsupportedModelError(
                    f"The stack must not be fed from itself within one backward pass, and the input of block "
                    f"{self.stack.names[index]!r} depends on an earlier pass through {self.stack.path}: detach it, or "
                    "train without Highway-BP."
                )
            name = owned.get(id(getattr(node, "variable", None)))
            if name is not None:
                raise UnsupportedModelError(
                    f"A parameter of the stack must not be used below it, and {name!r} also makes the input of block "
                    f"{self.stack.names[index]!r}: untie it, leave its block out with blocks=[...], or train without "
                    "Highway-BP."
                )

    def _check_sides(self, index: int, tape: Tape, sides: list[tuple[str, Tensor]]) -> None:
        for name, tensor in sides:
            if id(tensor) not in tape.side_leaves:
                raise EscapedTensorError(
                    f"Argument {name!r} of block {self.stack.names[index]!r} needs a gradient and the first block did "
                    "not get it, so its gradient would go around the stream. Pass the tensor to every block or detach "
                    "it, or train without Highway-BP."
                )

    def _record(self, index: int, tape: Tape, below: Tensor, forward: Forward, arguments: BlockArguments) -> object:
        name = self.stack.names[index]
        stream = arguments.stream(name)
        leaf = tape.leaf(name, stream)
        args, kwargs = arguments.replaced(leaf, tape.side_leaves)
        try:
            flat, layout = pytree.tree_flatten(forward(*args, **kwargs))
        except RuntimeError as error:
            if IN_PLACE not in str(error):
                raise
            raise UnsupportedModelError(
                f"Block {name!r} must leave its inputs as they are, and it changes one in place: write x = x + f(x) "
                "instead of x += f(x), or train without Highway-BP."
            ) from error
        self._check_stream(name, stream, next((item for item in flat if isinstance(item, Tensor)), None))
        positions = [i for i, item in enumerate(flat) if isinstance(item, Tensor) and item.requires_grad]
        outputs = [flat[i] for i in positions]
        self._check_closed(index, tape, leaf, outputs, arguments)
        tape.segments.append(Segment(name, index, leaf, outputs))
        aliases = tuple(output.detach() for output in outputs)
        # the gate marks the aliases as changed so as to return them, and their numbers stay what the block saved
        with _unsafe_preserve_version_counter(aliases):
            gated = Gate.apply(tape, len(tape.segments) - 1, below, *aliases)
        for position, output in zip(positions, gated, strict=True):
            flat[position] = output
        return pytree.tree_unflatten(flat, layout)

    @staticmethod
    def _check_stream(name: str, stream: Tensor, output: Tensor | None) -> None:
        if output is None or output.shape != stream.shape or not output.requires_grad:
            what = "no tensor" if output is None else f"{list(output.shape)}, requires_grad={output.requires_grad}"
            raise UnsupportedModelError(
                f"The first output of block {name!r} must be the residual stream, with the shape of its first "
                f"argument {list(stream.shape)} and a gradient, and it is {what}. Name other blocks with blocks=..."
            )

    def _check_closed(
        self, index: int, tape: Tape, leaf: Tensor, outputs: list[Tensor], arguments: BlockArguments
    ) -> None:
        name = self.stack.names[index]
        leaves = [tensor.grad_fn for tensor in (leaf, *tape.side_leaves.values()) if tensor.grad_fn is not None]
        source = foreign_source(outputs, leaves, self.stack.blocks[index], name)
        if source is not None:
            found = [path for key, value in arguments.named() for path, _ in differentiable_tensors(value, key)]
            raise EscapedTensorError(
                f"Block {name!r} reads a differentiable tensor around the stream: {source} (differentiable tensors in "
                f"its arguments: {', '.join(found) or 'none'}), and its gradient would be silently wrong. Detach that "
                "tensor, or train without Highway-BP."
            )
        first, start = outputs[0].grad_fn, leaf.grad_fn
        if first is not None and start is not None:
            self.residual.settle(index, name, first, start)
