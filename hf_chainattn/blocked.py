"""The forward pass of chain attention block by block: memory linear in the number of tokens.

Rows are taken in blocks from the top. What a block reads of earlier tokens is ordinary attention with the mixed values
``U`` in the place of values; inside the block a small triangular system remains. README.md derives it.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hf_chainattn.block import attend, by_head, pivots, solve_rows_, triangular_system
from hf_chainattn.masks import AttentionMask
from hf_chainattn.tiles import Tiles

# from _LONG tokens on the wide one is faster; see python -m benchmarks.run chain
_BLOCK, _WIDE_BLOCK, _LONG = 64, 128, 2048
# rows that read everything before them in one call
_SPAN = 512
# heads of all batch rows that are taken together
_TOGETHER = 32


class Saved(NamedTuple):
    """The result of the forward pass, and what the backward pass needs of it.

    Args:
        output: ``[B, H, T, E]``, ``Y``.
        mixed: ``[B, H, T, E]``, ``U``.
        off_read: ``[B, H, T, E]``, ``U`` as each token reads it of the others, without its own.
        log_sum: ``[B, H, T, 1]``, log in base 2 of the sum of exponentials of each row, ``inf`` if it sees nothing.
        off_mass: ``[B, H, T, 1]``, attention of each token to the others.
    """

    output: Tensor
    mixed: Tensor
    off_read: Tensor
    log_sum: Tensor
    off_mass: Tensor


def block_of(mask: AttentionMask) -> int:
    """Return how many rows are solved together. With a window, wide blocks would compute much that is hidden."""
    return _BLOCK if mask.tokens < _LONG or mask.local else _WIDE_BLOCK


def blocked_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gamma: Tensor,
    halting: Tensor,
    mask: AttentionMask,
    *,
    kept: bool,
    scale: float,
    softcap: float | None,
) -> Saved:
    """Return chain attention under a triangular mask.

    Args:
        query: ``[B, H, T, D]``, float32 or float64, as the rest.
        key: ``[B, G, T, D]``, ``G`` a divisor of ``H``.
        value: ``[B, G, T, E]``.
        gamma: ``[H]``.
        halting: ``1 - gamma``, ``[H]``, given apart because the difference of a rounded gamma loses digits.
        mask: Who sees whom.
        kept: Whether the diagonal takes part in the walk.
        scale: Factor on the logits.
        softcap: Bound on the logits.

    Returns:
        The output and its record. Time O(T^2 (D + E)), or O(T window (D + E)); memory O(T (D + E)).
    """
    width = value.shape[-1]
    record = Saved(*(value.new_empty(*query.shape[:3], size) for size in (width, width, width, 1, 1)))
    for rows in rows_together(query):
        tiles = Tiles(query[rows], key[rows], mask.of(rows, slice(None)), scale=scale, softcap=softcap)
        _fill(Saved(*(part[rows] for part in record)), tiles, value[rows], gamma, halting, kept)
    return record


def rows_together(query: Tensor) -> Iterator[slice]:
    """Yield batch rows to be taken together: so many heads as keep the cores busy and their tiles in the caches."""
    size = max(1, _TOGETHER // query.shape[1])
    for start in range(0, len(query), size):
        yield slice(start, start + size)


def _fill(record: Saved, tiles: Tiles, value: Tensor, gamma: Tensor, halting: Tensor, kept: bool) -> None:
    """Compute the record of some batch rows."""
    mask = tiles.mask
    batch, heads, tokens, width = record.output.shape
    saved = Saved(*(part.view(batch * heads, tokens, -1) for part in record))
    hop, halt = (by_head(part, batch) for part in (gamma, halting))
    # a row of U begins as (1 - gamma) v; its block replaces it by the solution
    by_group = saved.mixed.view(batch, -1, tiles.repeats, tokens, width)
    torch.mul(value.unsqueeze(2), halting.view(-1, tiles.repeats, 1, 1), out=by_group)
    block, fuse = block_of(mask), tokens > _SPAN and tiles.can_fuse(width)
    starts = range(0, tokens, block)
    firsts = [start - start % _SPAN if fuse else mask.first_key(start, min(start + block, tokens)) for start in starts]
    widest = max(min(start + block, tokens) - first for start, first in zip(starts, firsts, strict=True))
    # the widest first: what follows fits into it
    tiles.space.take("products", batch * heads, min(block, tokens), widest)
    earlier = None
    for start, first in zip(starts, firsts, strict=True):
        rows = slice(start, min(start + block, tokens))
        if fuse and start == first > 0:
            earlier = tiles.fused_read(slice(start, min(start + _SPAN, tokens)), start, saved.mixed)
        _solve_block(tiles, saved, hop, halt, rows, first, earlier, kept)


def _solve_block(
    tiles: Tiles,
    saved: Saved,
    hop: Tensor,
    halt: Tensor,
    rows: slice,
    first: int,
    earlier: tuple[Tensor, Tensor] | None,
    kept: bool,
) -> None:
    """Solve some rows, given all rows above them, and write them into the record.

    Args:
        tiles: The attention matrix.
        saved: The record, ``[N, T, ...]``.
        hop: ``[N, 1, 1]``, gamma of each head.
        halt: ``[N, 1, 1]``, ``1 - gamma``.
        rows: Which rows.
        first: The first key to be read here.
        earlier: What rows from ``first`` on read of the keys before it, ``[N, .., E]``, and the log in base 2 of the
            sum of their exponentials, ``[N, .., 1]``.
        kept: Whether the diagonal takes part in the walk.
    """
    if earlier is not None:
        earlier_read, earlier_sum = (part[:, rows.start - first : rows.stop - first] for part in earlier)
    weights, total, own, off, share, log_sum = attend(tiles, rows, first, None if earlier is None else earlier_sum)
    # only what is needed is divided: the rows of the system, and sums over earlier keys
    inside = weights[..., rows.start - first :].div_(total)
    read = _buffer(tiles, "read", saved.off_read[:, rows])
    if rows.start > first:
        torch.bmm(weights[..., : rows.start - first], saved.mixed[:, first : rows.start], out=read).div_(total)
    else:
        read.zero_()
    if share is not None:
        read.addcmul_(earlier_read, share)
    mixed = _buffer(tiles, "mixed", saved.mixed[:, rows])
    torch.addcmul(saved.mixed[:, rows], read, hop, out=mixed)
    pivot = pivots(own, off, hop, halt, kept=kept, plain=tiles.mask.plain)
    system = triangular_system(inside, pivot, hop, out=tiles.space.take("system", *inside.shape))
    solve_rows_(system, mixed)
    read.baddbmm_(inside, mixed)
    torch.addcmul(read, own, mixed, out=saved.output[:, rows])
    for result, target in zip((mixed, read, log_sum, off), saved[1:], strict=True):
        target[:, rows] = result


def _buffer(tiles: Tiles, name: str, target: Tensor) -> Tensor:
    """Return contiguous memory in the shape of ``target``: itself if it is contiguous."""
    return target if target.is_contiguous() else tiles.space.take(name, *target.shape)
