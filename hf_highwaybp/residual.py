"""The residual map K of each block: what the stream keeps on its way past the block."""

from collections.abc import Callable
from typing import Literal

from torch import Tensor
from torch.autograd.graph import Node

from hf_highwaybp.config import check_residual
from hf_highwaybp.errors import UnsupportedModelError

ResidualMap = Callable[[int, Tensor], Tensor]
Path = Literal["identity", "rescaled"]

# measured on a small post-LN BERT over training: K = I is not monotone in k there, 0.8 is
POST_NORM_FACTOR = 0.8
# nodes that only add, or lay the same numbers out differently
TRANSPARENT = frozenset(
    f"{name}Backward0"
    for name in (
        *("Add", "Sub", "Clone", "ToCopy", "Alias"),
        *("View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze", "Transpose", "Permute", "T"),
    )
)
SCALING = frozenset({"MulBackward0", "DivBackward0"})


def residual_path(output: Node, leaf: Node) -> Path | None:
    """Return what lies on the residual path of one block: nothing, a rescaling, or ``None`` if there is no such path.

    The recorded graph is searched from the block's output to its input through additions and changes of layout.
    A normalization, or a product with one factor that needs no gradient, is crossed as a rescaling: this is where
    post-LN blocks differ from pre-LN ones. Every other node ends the search on that branch.

    Args:
        output: Graph node that made the block's output.
        leaf: Graph node that made the block's input.

    Returns:
        "identity" for a pre-LN block, "rescaled" for a post-LN one, ``None`` for a block that is not residual.
    """
    frontier, reached = _flood([output], leaf)
    if reached:
        return "identity"
    # two norms lie one behind the other in a whole post-LN block, more in stranger ones
    while frontier:
        frontier, reached = _flood(frontier, leaf)
        if reached:
            return "rescaled"
    return None


def _flood(start: list[Node], leaf: Node) -> tuple[list[Node], bool]:
    """Return the nodes behind the next rescaling, and whether ``leaf`` was reached before any."""
    behind: list[Node] = []
    pending, seen = list(start), set(start)
    while pending:
        node = pending.pop()
        if node is leaf:
            return [], True
        inputs = [parent for parent, _ in node.next_functions if parent is not None]
        if node.name() in TRANSPARENT:
            fresh = [parent for parent in inputs if parent not in seen]
            seen.update(fresh)
            pending.extend(fresh)
        elif "Norm" in node.name():
            # the stream is the first input of every norm, the others are weight and bias
            behind.extend(inputs[:1])
        elif node.name() in SCALING and len(inputs) == 1:
            behind.extend(inputs)
    return behind, False


class ResidualChoice:
    """The residual map of every block, chosen by the user or from where the block's norm sits.

    Args:
        setting: "default", "identity", "zero", a factor in ``[0, 1]``, or a function that takes the block's index and
            a cotangent of the stream's shape and returns the product with K, of the same shape.

    Raises:
        TypeError: If the setting is of another kind.
        ValueError: If the name is unknown or the factor is outside ``[0, 1]``.
    """

    def __init__(self, setting: str | float | ResidualMap | None) -> None:
        self.setting: str | float | ResidualMap = setting if callable(setting) else check_residual(setting)
        self.paths: dict[int, Path] = {}

    @property
    def needs_path(self) -> bool:
        """Whether a residual path must exist: always, unless K is 0 or a function that knows better."""
        return not callable(self.setting) and self.setting not in ("zero", 0.0)

    def settle(self, index: int, name: str, output: Node, leaf: Node) -> None:
        """Look once at the graph of a block, and keep what its residual path is.

        Args:
            index: Index of the block.
            name: Its name, for the message.
            output: Graph node that made its output.
            leaf: Graph node that made its input.

        Raises:
            UnsupportedModelError: If a residual path is needed and there is none.
        """
        if index in self.paths or not self.needs_path:
            return
        path = residual_path(output, leaf)
        if path is None:
            raise UnsupportedModelError(
                f"Block {name!r} has no residual path: its output is not its input plus something, so Highway-BP has "
                "nothing to carry gradients along. Pass residual='zero' (fixed-point iteration), or a function "
                "residual(index, cotangent) that multiplies with the block's own K."
            )
        self.paths[index] = path

    def factor(self, index: int) -> float | None:
        """Return the factor K of block ``index``, or ``None`` if K is a function."""
        return None if callable(self.setting) else self._number(index)

    def _number(self, index: int) -> float:
        if isinstance(self.setting, float):
            return self.setting
        if self.setting == "default":
            return POST_NORM_FACTOR if self.paths.get(index) == "rescaled" else 1.0
        return 0.0 if self.setting == "zero" else 1.0

    def apply(self, index: int, cotangent: Tensor) -> Tensor:
        """Return K times a cotangent.

        Args:
            index: Index of the block.
            cotangent: Of the shape of the stream, ``[...]``.

        Returns:
            ``[...]``, in the dtype of the cotangent.

        Raises:
            ValueError: If the user's function returns another shape.
        """
        if callable(self.setting):
            product = self.setting(index, cotangent)
            if product.shape != cotangent.shape:
                raise ValueError(
                    f"residual(index, cotangent) must return the shape of the cotangent, {tuple(cotangent.shape)}, "
                    f"and returned {tuple(product.shape)} for block {index}."
                )
            return product
        factor = self._number(index)
        return cotangent if factor == 1.0 else cotangent * factor
