"""The proof that a block's local graph is closed: it reads its stream, parameters and side inputs, nothing else."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping

from torch import Tensor, nn
from torch.autograd.graph import Node

from hf_highwaybp.errors import UnsupportedModelError

SEARCH_DEPTH = 4
COMPILED = (
    "Block {name!r} must run uncompiled, and it was compiled by torch.compile: compiled blocks cannot be recorded, "
    "attach to the uncompiled model."
)


def reachable(start: Collection[Node]) -> Iterator[Node]:
    """Yield every graph node that a backward pass from ``start`` may run, ``start`` included."""
    pending = list(start)
    # the node objects are kept, not their ids: torch may reuse the address of a wrapper that died
    seen: set[Node] = set(pending)
    while pending:
        node = pending.pop()
        yield node
        fresh = [parent for parent, _ in node.next_functions if parent is not None and parent not in seen]
        seen.update(fresh)
        pending.extend(fresh)


def foreign_source(outputs: list[Tensor], leaves: Collection[Node], block: nn.Module, name: str) -> str | None:
    """Walk the local graph of one block call and return what it reads that is not the block's own.

    Args:
        outputs: Differentiable outputs of the call, each ``[...]``.
        leaves: Graph nodes of the stream leaf and of the side inputs: the walk ends there.
        block: The block, whose parameters are allowed leaves.
        name: Its name, for the message.

    Returns:
        Words for a foreign source, the block or model part it comes from where that is known; ``None`` if the graph is
        closed.

    Raises:
        UnsupportedModelError: If the block ran under reentrant checkpointing or is compiled: both hide its graph.
    """
    stranger: str | None = None
    own = {id(parameter) for parameter in block.parameters()}
    pending = [output.grad_fn for output in outputs if output.grad_fn is not None]
    # the node objects are kept, not their ids: torch may reuse the address of a wrapper that died
    seen: set[Node] = set(pending)
    while pending:
        node = pending.pop()
        if node in leaves:
            continue
        if node.name() == "CheckpointFunctionBackward":
            raise UnsupportedModelError(
                f"Block {name!r} ran under reentrant checkpointing, whose graph Highway-BP cannot read. "
                "Pass activation_checkpointing_kwargs={'use_reentrant': False}."
            )
        if node.name() == "CompiledFunctionBackward":
            raise UnsupportedModelError(COMPILED.format(name=name))
        origin = getattr(node, "origin", None)
        if isinstance(origin, str):
            return origin
        # only the nodes that accumulate into leaves have a variable
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor) and id(variable) not in own:
            stranger = f"a parameter or leaf of shape {list(variable.shape)} outside the block"
        fresh = [parent for parent, _ in node.next_functions if parent is not None and parent not in seen]
        seen.update(fresh)
        pending.extend(fresh)
    return stranger


def differentiable_tensors(value: object, path: str, depth: int = SEARCH_DEPTH) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor that needs a gradient inside a value, with the expression that reaches it.

    Args:
        value: A tensor, a container, a dataclass or any object such as a key/value cache.
        path: Expression for ``value`` itself, e.g. the argument's name.
        depth: Levels of nesting to look into.

    Yields:
        Pairs of expression and tensor ``[...]``.
    """
    if isinstance(value, Tensor):
        if value.requires_grad:
            yield path, value
        return
    if depth == 0 or isinstance(value, nn.Module | type | str | bytes):
        return
    if isinstance(value, Mapping):
        items = [(f"{path}[{key!r}]", item) for key, item in value.items()]
    elif isinstance(value, list | tuple):
        items = [(f"{path}[{index}]", item) for index, item in enumerate(value)]
    elif dataclasses.is_dataclass(value) or hasattr(value, "__dict__"):
        items = [(f"{path}.{key}", item) for key, item in vars(value).items()]
    else:
        return
    for inner, item in items:
        yield from differentiable_tensors(item, inner, depth - 1)
