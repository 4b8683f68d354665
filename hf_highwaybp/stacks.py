"""Finding the stack of blocks in a model."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from hf_highwaybp.errors import UnsupportedModelError

# one list is taken for the stack without being named if it holds this many times the parameters of any other
DOMINANCE = 10
# modules that a message lists
LISTED = 12
# these take parameters apart or copy modules, which the forward at the level of the instance does not survive
FOREIGN_WRAPPERS = frozenset({"DataParallel", "FullyShardedDataParallel", "DeepSpeedEngine"})


@dataclass(frozen=True)
class Stack:
    """The blocks between which the residual stream runs, in the order of the forward pass.

    Attributes:
        path: Dotted path of the list, or "blocks" if the modules were given one by one.
        names: Name of each block in the model, for messages.
        blocks: The modules.
    """

    path: str
    names: tuple[str, ...]
    blocks: tuple[nn.Module, ...]


def find_stack(model: nn.Module, blocks: str | Sequence[nn.Module] | None = None) -> Stack:
    """Return the stack of residual blocks of a model.

    Without ``blocks`` it is the one ``nn.ModuleList`` of blocks of one class. Lists inside the blocks of another list
    (experts, for example) do not count; among several the one with ten times the parameters of any other is taken.

    Args:
        model: Any module.
        blocks: Dotted path to an ``nn.ModuleList`` or ``nn.Sequential``, or the modules in order.

    Returns:
        The stack.

    Raises:
        UnsupportedModelError: If there is none, or several of equal standing.
        TypeError: If ``blocks`` does not name or hold modules.
        ValueError: If ``blocks`` is empty or not part of the model.
    """
    if isinstance(blocks, str):
        return _named_stack(model, blocks)
    if blocks is not None:
        return _given_stack(model, blocks)
    lists = _outermost_lists(model)
    candidates = sorted(
        ((name, stack) for name, stack in lists.items() if len({type(block) for block in stack}) == 1),
        key=lambda item: -_parameters(item[1]),
    )
    if not candidates:
        raise _refusal(model, lists, "No stack of blocks of one class found")
    if len(candidates) > 1 and _parameters(candidates[0][1]) < DOMINANCE * _parameters(candidates[1][1]):
        raise _refusal(model, lists, "Several stacks of equal standing found")
    path, stack = candidates[0]
    return Stack(path, tuple(f"{path}.{index}" for index in range(len(stack))), tuple(stack))


def check_unsharded(model: nn.Module) -> None:
    """Refuse models whose parameters or modules are in the hands of a sharding engine.

    Args:
        model: Any module.

    Raises:
        UnsupportedModelError: If the model is wrapped by FSDP, DeepSpeed or ``nn.DataParallel``.
    """
    wrappers = {type(module).__name__ for module in model.modules()} & FOREIGN_WRAPPERS
    # FSDP2 leaves the class of the modules alone and shards the parameters, ZeRO-3 marks them
    if any(type(p).__name__ == "DTensor" or hasattr(p, "ds_id") for p in model.parameters()):
        wrappers.add("sharded parameters")
    if wrappers:
        raise UnsupportedModelError(
            f"Highway-BP is not tested with {', '.join(sorted(wrappers))}: train with DistributedDataParallel or on "
            "one device, or without Highway-BP."
        )


def _named_stack(model: nn.Module, path: str) -> Stack:
    try:
        # the empty path is torch's name for the model itself
        container = model.get_submodule(path or "no path")
    except AttributeError:
        raise ValueError(_unknown_path(model, path)) from None
    if not isinstance(container, nn.ModuleList | nn.Sequential):
        raise TypeError(
            f"blocks must lead to an nn.ModuleList or nn.Sequential, and {path!r} is a {type(container).__name__}."
        )
    if len(container) == 0:
        raise ValueError(f"blocks must lead to at least one block, and {path!r} is empty.")
    return Stack(path, tuple(f"{path}.{name}" for name, _ in container.named_children()), tuple(container))


def _unknown_path(model: nn.Module, path: str) -> str:
    """Return the message that names what there is where the path ends."""
    holder: nn.Module = model
    seen: list[str] = []
    for part in path.split("."):
        inner = dict(holder.named_children()).get(part)
        if inner is None:
            break
        holder, seen = inner, [*seen, part]
    children = [repr(name) for name, _ in holder.named_children()]
    listed = ", ".join(children[:LISTED]) + (", ..." if len(children) > LISTED else "")
    where = repr(".".join(seen)) if seen else "it"
    return (
        f"blocks must be a dotted path in {type(model).__name__}, got {path!r}; {where} has {listed or 'no modules'}."
    )


def _given_stack(model: nn.Module, blocks: Sequence[nn.Module]) -> Stack:
    if not isinstance(blocks, Sequence | nn.ModuleList | nn.Sequential) or not all(
        isinstance(block, nn.Module) for block in blocks
    ):
        raise TypeError(f"blocks must be a dotted path or a sequence of modules, got {blocks!r}.")
    if len(blocks) == 0:
        raise ValueError("blocks must hold at least one module, got none.")
    names = {id(module): name for name, module in model.named_modules()}
    strangers = [type(block).__name__ for block in blocks if id(block) not in names]
    if strangers:
        raise ValueError(f"blocks must be modules of {type(model).__name__}, and these are not: {strangers}.")
    return Stack("blocks", tuple(names[id(block)] for block in blocks), tuple(blocks))


def _outermost_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside_another = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) and not inside_another:
            found[name] = module
    return found


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _refusal(model: nn.Module, lists: dict[str, nn.ModuleList], reason: str) -> UnsupportedModelError:
    seen = [
        f"{name} ({len(stack)} x {' / '.join(sorted({type(block).__name__ for block in stack}))})"
        for name, stack in lists.items()
    ]
    example = next(iter(lists), "path.to.list")
    return UnsupportedModelError(
        f"{reason} in {type(model).__name__}. Highway-BP needs one list of blocks that each add to the stream "
        f"they read (module lists seen: {', '.join(seen) or 'none'}). Name it with "
        f"HighwayBP(model, blocks={example!r}), or blocks=list(model) for an nn.Sequential, or train "
        "without Highway-BP."
    )
