"""The oracle: Highway-BP as a sum over paths of dense Jacobians. Slow, short, for a few hundred numbers."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class PathSum:
    """Result of the path sum.

    Attributes:
        cotangents: Of the output of each block, each of the shape of the stream, ``[...]``.
        parameters: Gradients of each block's parameters in the order of ``Module.parameters``.
        stream: Gradient of the input of the stack, ``[...]``: the cotangent of the first output, pulled through the
            whole first block.
    """

    cotangents: tuple[Tensor, ...]
    parameters: tuple[tuple[Tensor, ...], ...]
    stream: Tensor


def path_sum_gradients(
    blocks: Sequence[nn.Module],
    loss: Callable[[Sequence[Tensor]], Tensor],
    stream: Tensor,
    *,
    k: int,
    factors: Sequence[float],
) -> PathSum:
    r"""Highway-BP's gradients by enumeration of all paths.

    Block ``i`` has the Jacobian ``D_i = J_i + K_i`` with ``K_i = factors[i] * I``. The cotangent of the output of
    block ``i`` is the sum over the blocks ``j >= i`` that the loss reads and over all ways down from ``j`` to ``i``
    with either ``J`` or ``K`` at each block in between, with at most ``k`` times ``J``: arXiv 2501.17086, Theorem 2.
    Cost: ``2 ** L`` products of dense Jacobians for ``L`` blocks.

    Args:
        blocks: Deterministic modules from ``[...]`` to ``[...]``.
        loss: From the outputs of all blocks, each ``[...]``, to a scalar.
        stream: Input of the first block, ``[...]``; float64 for a comparison to the last digit.
        k: Greatest number of Jacobians ``J`` on a path.
        factors: One residual factor for each block.

    Returns:
        The cotangents and gradients, in the dtype of ``stream``.

    Example:
        >>> blocks = [nn.Linear(2, 2, bias=False) for _ in range(2)]
        >>> last = lambda outputs: outputs[-1].sum()
        >>> sums = path_sum_gradients(blocks, last, torch.ones(2), k=1, factors=[0.0, 0.0])
        >>> torch.allclose(sums.cotangents[0], blocks[1].weight.sum(0))
        True
    """
    streams = [stream.detach()]
    for block in blocks:
        streams.append(block(streams[-1]).detach())
    outputs = [value.clone().requires_grad_() for value in streams[1:]]
    read = torch.autograd.grad(loss(outputs), outputs, allow_unused=True)
    external = [torch.zeros(stream.numel(), dtype=stream.dtype) if g is None else g.flatten() for g in read]
    dense = [_jacobian(block, value) for block, value in zip(blocks, streams[:-1], strict=True)]
    kept = [factor * torch.eye(stream.numel(), dtype=stream.dtype) for factor in factors]
    flat = [_path_sum(i, external, dense, kept, k) for i in range(len(blocks))]
    cotangents = tuple(value.view_as(stream) for value in flat)
    parameters = tuple(
        torch.autograd.grad(block(value), list(block.parameters()), cotangent)
        for block, value, cotangent in zip(blocks, streams[:-1], cotangents, strict=True)
    )
    return PathSum(cotangents, parameters, (flat[0] @ dense[0]).view_as(stream))


def _jacobian(block: nn.Module, value: Tensor) -> Tensor:
    jacobian: Tensor = torch.autograd.functional.jacobian(block, value)
    return jacobian.reshape(value.numel(), value.numel())


def _path_sum(i: int, external: list[Tensor], dense: list[Tensor], kept: list[Tensor], k: int) -> Tensor:
    total = torch.zeros_like(external[i])
    for j in range(i, len(external)):
        # blocks j, j - 1, ..., i + 1 lie between the two outputs
        for choices in itertools.product((False, True), repeat=j - i):
            if sum(choices) > k:
                continue
            cotangent = external[j]
            for block, through_jacobian in zip(range(j, i, -1), choices, strict=True):
                matrix = dense[block] - kept[block] if through_jacobian else kept[block]
                cotangent = cotangent @ matrix
            total = total + cotangent
    return total
