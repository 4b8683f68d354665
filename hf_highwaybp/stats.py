"""What the last backward pass did."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class HighwayStats:
    """Account of one backward pass through the stack.

    Attributes:
        k: Iterations that ran; 0 and up, ``blocks - 1`` for an exact pass.
        exact: Whether the gradients are those of backpropagation.
        blocks: Number of block calls that received a gradient.
        vjps: Vector-Jacobian products of single blocks so far, parameter passes included.
        update_norms: 2-norm of the update of all cotangents in each iteration; empty for an exact pass.
        cotangent_norm: 2-norm of all cotangents after the last iteration; ``None`` for an exact pass.
    """

    k: int
    exact: bool
    blocks: int
    vjps: int
    update_norms: tuple[float, ...]
    cotangent_norm: float | None

    @property
    def residual_norm(self) -> float | None:
        """Norm of the last update over that of the cotangents; ``None`` if nothing was iterated."""
        if not self.update_norms or not self.cotangent_norm:
            return None
        return self.update_norms[-1] / self.cotangent_norm


@dataclass
class PassLog:
    """The same account while it is written; norms stay tensors, so that no sweep waits for a device."""

    k: int = 0
    exact: bool = True
    blocks: int = 0
    vjps: int = 0
    updates: list[Tensor] = field(default_factory=list)
    cotangent: Tensor | None = None

    def freeze(self) -> HighwayStats:
        """Return the account with its norms as floats; waits for the devices that hold them."""
        return HighwayStats(
            k=self.k,
            exact=self.exact,
            blocks=self.blocks,
            vjps=self.vjps,
            update_norms=tuple(float(norm) for norm in self.updates),
            cotangent_norm=None if self.cotangent is None else float(self.cotangent),
        )


def total_norm(tensors: list[Tensor]) -> Tensor:
    """Return the 2-norm of all tensors together as a scalar tensor on the device of the first.

    Args:
        tensors: At least one, each ``[...]``.
    """
    device = tensors[0].device
    return torch.stack([torch.linalg.vector_norm(tensor).to(device) for tensor in tensors]).norm()
