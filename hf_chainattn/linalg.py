"""Solving with matrices of no special form, without a fault of PyTorch's CPU build.

With more than one thread its LU of a batch of matrices of some 150 rows or more is wrong or fails
(github.com/pytorch/pytorch/issues/142815; seen with torch 2.13). One matrix at a time it is right.
"""

import torch
from torch import Tensor


def solve(matrix: Tensor, right: Tensor) -> Tensor:
    """Return ``X`` with ``matrix X = right``, as ``torch.linalg.solve``; differentiable any number of times.

    Args:
        matrix: ``[..., T, T]``.
        right: ``[..., T, E]``, with the same leading sizes.
    """
    if matrix.device.type != "cpu" or matrix.ndim == 2:
        return torch.linalg.solve(matrix, right)
    pairs = zip(matrix.flatten(0, -3), right.flatten(0, -3), strict=True)
    solutions = [torch.linalg.solve(one, of_one) for one, of_one in pairs]
    return torch.stack(solutions).view(right.shape) if solutions else torch.empty_like(right)


def lu_factor(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return LU factors and exchanges of each matrix ``[N, T, T]``; a singular one gives ``inf`` or ``nan`` later."""
    if matrix.device.type != "cpu":
        return torch.linalg.lu_factor_ex(matrix)[:2]
    parts = [torch.linalg.lu_factor_ex(one)[:2] for one in matrix]
    return torch.stack([factors for factors, _ in parts]), torch.stack([exchanges for _, exchanges in parts])


def lu_solve(factors: Tensor, exchanges: Tensor, right: Tensor, *, adjoint: bool) -> Tensor:
    """Return the solutions ``[N, T, E]`` that belong to ``lu_factor``, of the transposed matrices if ``adjoint``."""
    if factors.device.type != "cpu":
        return torch.linalg.lu_solve(factors, exchanges, right, adjoint=adjoint)
    heads = zip(factors, exchanges, right, strict=True)
    return torch.stack([torch.linalg.lu_solve(*head, adjoint=adjoint) for head in heads])
