"""Classifiers whose smoothed versions are known in closed form."""

import torch
from torch import Tensor, nn


class HalfSpace(nn.Module):
    """Class 0 where ``<weight, x> > 0``, else 1: its smoothed radius is the distance to the plane at any sigma."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        score = x.flatten(1) @ self.weight
        return torch.stack((score, -score), dim=1)

    def distance(self, x: Tensor) -> float:
        """Return the signed l2 distance of ``x`` to the plane."""
        return float((x.flatten().double() @ self.weight.double()) / self.weight.double().norm())


class Slabs(nn.Module):
    """K classes in slabs of the first coordinate, between the given edges: probabilities are differences of Phi."""

    def __init__(self, edges: list[float]) -> None:
        super().__init__()
        self.edges = nn.Buffer(torch.tensor(edges))

    def forward(self, x: Tensor) -> Tensor:
        slab = torch.bucketize(x.flatten(1)[:, 0].contiguous(), self.edges)
        return nn.functional.one_hot(slab, len(self.edges) + 1).float()


def half_space(size: int = 12) -> HalfSpace:
    """Return a half-space through the origin with a fixed oblique normal of ``size`` coordinates, in eval mode."""
    return HalfSpace(torch.linspace(-1.0, 2.0, size)).eval()
