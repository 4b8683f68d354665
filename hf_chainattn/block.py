"""The steps of one block of rows, forward and backward, for sequences of one block and of many.

Letters: ``N`` is batch times query heads, ``E`` value width.
"""

import torch
from torch import Tensor

from hf_chainattn.tiles import Tiles


def attend(
    tiles: Tiles, rows: slice, first: int = 0, earlier_sum: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Return the attention of some rows to the keys from ``first`` on, and its sums.

    Args:
        tiles: The attention matrix.
        rows: Which rows.
        first: The first key.
        earlier_sum: Log in base 2 of the sum of exponentials over the keys before ``first``, ``[N, rows, 1]``.

    Returns:
        ``[N, rows, rows.stop - first]``, the weights without those of a token to itself, each row times a number; that
        number; the weights of tokens to themselves; the weight of all other keys in sum; that of the keys before
        ``first``, ``None`` if there are none; and the log in base 2 of the sum of exponentials, ``inf`` if the row
        sees nothing. All but the first are ``[N, rows, 1]``.
    """
    logits = tiles.logits(rows, slice(first, rows.stop))
    peak = logits.amax(-1, keepdim=True)
    if earlier_sum is not None:
        peak = torch.maximum(peak, earlier_sum)
    if not tiles.mask.plain:
        # a row that sees nothing holds only -inf
        peak.clamp_(min=torch.finfo(peak.dtype).min)
    weights = logits.sub_(peak).exp2_()
    diagonal = weights[..., rows.start - first :].diagonal(dim1=-2, dim2=-1)
    own = diagonal.unsqueeze(-1).clone()
    diagonal.zero_()
    off, share = weights.sum(-1, keepdim=True), None
    if earlier_sum is not None:
        share = (earlier_sum - peak).exp2_()
        off += share
    total = off + own
    log_sum = peak.add_(total.log2())
    if not tiles.mask.plain:
        empty = total == 0
        log_sum.masked_fill_(empty, torch.inf)
        total.masked_fill_(empty, 1.0)
    return weights, total, own.div_(total), off.div_(total), None if share is None else share.div_(total), log_sum


def by_head(numbers: Tensor, batch: int) -> Tensor:
    """Return numbers of each head ``[H]`` as ``[N, 1, 1]``."""
    return (numbers if batch == 1 else numbers.repeat(batch)).view(-1, 1, 1)


def pivots(own: Tensor, off: Tensor, hop: Tensor, halt: Tensor, *, kept: bool, plain: bool) -> Tensor:
    """Return the diagonal of ``I - gamma A_c`` for some rows, ``[N, rows, 1]`` as the attention given.

    Args:
        own: Attention of each token to itself.
        off: Attention to all others.
        hop: ``[N, 1, 1]``, gamma.
        halt: ``[N, 1, 1]``, ``1 - gamma``.
        kept: Whether the diagonal takes part in the walk.
        plain: Whether every token sees something.
    """
    if not kept:
        return torch.ones_like(own)
    # 1 - gamma * own as a sum of positive terms: nothing cancels as gamma nears 1
    pivot = torch.addcmul(halt, off, hop)
    return pivot if plain else pivot.masked_fill_(own + off == 0, 1.0)


def triangular_system(weights: Tensor, pivot: Tensor, hop: Tensor, out: Tensor | None = None) -> Tensor:
    """Return ``I - gamma A_c`` of a diagonal block, ``[N, rows, rows]``, whatever the diagonal of ``weights``."""
    system = torch.mul(weights, -hop, out=out)
    system.diagonal(dim1=-2, dim2=-1).copy_(pivot.squeeze(-1))
    return system


def solve_rows_(system: Tensor, right: Tensor) -> None:
    """Solve lower triangular systems ``[N, rows, rows]``, the solution in the place of ``right`` ``[N, rows, E]``."""
    # transposed, the rows lie as the kernel wants them: half the time of the direct call
    torch.linalg.solve_triangular(system.mT, right.mT, upper=True, left=False, out=right.mT)


def solve_columns_(system: Tensor, right: Tensor) -> None:
    """Solve the transposed systems, ``system^T x = right``, likewise."""
    torch.linalg.solve_triangular(system, right.mT, upper=False, left=False, out=right.mT)


def row_sums(
    own: Tensor,
    off_mass: Tensor,
    z: Tensor,
    d_output: Tensor,
    mixed: Tensor,
    off_read: Tensor,
    *,
    kept: bool,
) -> tuple[Tensor, Tensor]:
    """Return what the softmax of some rows takes from every cotangent, and the cotangent of their diagonal logits.

    Args:
        own: Attention of each token to itself, ``[N, rows, 1]``.
        off_mass: Attention of each token to all others, ``[N, rows, 1]``.
        z: Cotangent of a row of weights over ``u``, ``[N, rows, E]``.
        d_output: Cotangent of ``Y``, ``[N, rows, E]``.
        mixed: ``U``, ``[N, rows, E]``.
        off_read: What each token reads of all others, ``[N, rows, E]``.
        kept: Whether the diagonal takes part in the walk.

    Returns:
        The sum over a row of weight times cotangent, and that cotangent, ``[N, rows, 1]`` each.
    """
    # the cotangent of a weight is z u, that of the diagonal weight of the second convention dY u
    of_own = ((z if kept else d_output) * mixed).sum(-1, keepdim=True)
    of_others = (z * off_read).sum(-1, keepdim=True)
    delta = torch.addcmul(of_others, own, of_own)
    # of_own - delta with 1 - own replaced by the mass of the others, which does not cancel
    return delta, own * (off_mass * of_own - of_others)


def through_softmax(
    weights: Tensor, z: Tensor, delta: Tensor, mixed: Tensor, d_own: Tensor | None, out: Tensor | None = None
) -> Tensor:
    """Return the cotangent of a tile of logits, ``[N, rows, columns]``.

    Args:
        weights: Of the tile.
        z: Of its rows.
        delta: Of its rows, from ``row_sums``, as ``d_own``.
        mixed: ``U`` of its columns, ``[N, columns, E]``.
        d_own: Cotangent of the diagonal, of as many rows as the tile has columns; ``None`` if it has none.
        out: Memory for the result.
    """
    d_logits = torch.bmm(z, mixed.mT, out=out).sub_(delta).mul_(weights)
    if d_own is not None:
        d_logits.diagonal(dim1=-2, dim2=-1).copy_(d_own.squeeze(-1))
    return d_logits
