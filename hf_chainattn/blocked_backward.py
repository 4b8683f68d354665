"""The backward pass of blocked chain attention: one sweep over the same blocks, from the bottom.

With ``x`` the cotangent of ``(I - gamma A_c) U`` and ``z = dY + gamma x``, each block reads ``A^T z`` of the rows
below it, solves the transposed system of its own rows, and adds to the gradients. README.md derives it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from hf_chainattn.block import by_head, pivots, row_sums, solve_columns_, through_softmax, triangular_system
from hf_chainattn.blocked import Saved, block_of, rows_together
from hf_chainattn.masks import AttentionMask
from hf_chainattn.tiles import Tiles

# rows below a block are taken so many at a time
_TILE = 512


class Gradients(NamedTuple):
    """Gradients, each in the shape of its argument; of gamma and bias ``None`` if not asked for."""

    query: Tensor
    key: Tensor
    value: Tensor
    gamma: Tensor | None
    bias: Tensor | None


class _State(NamedTuple):
    """What the sweep reads and writes. Tensors are ``[N, T, ...]`` with ``N = B * H``, the bias as it was given."""

    tiles: Tiles
    hop: Tensor
    halt: Tensor
    kept: bool
    value: Tensor
    mixed: Tensor
    off_read: Tensor
    log_sum: Tensor
    off_mass: Tensor
    d_output: Tensor
    d_mixed: Tensor | None
    # x and z of the module's docstring, and delta, the sum over a row of weight times its cotangent
    x: Tensor
    z: Tensor
    delta: Tensor
    d_query: Tensor
    d_key: Tensor
    d_gamma: Tensor | None
    d_bias: Tensor | None


def blocked_backward(
    d_output: Tensor,
    d_mixed: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gamma: Tensor,
    halting: Tensor,
    mask: AttentionMask,
    mixed: Tensor,
    off_read: Tensor,
    log_sum: Tensor,
    off_mass: Tensor,
    *,
    kept: bool,
    scale: float,
    softcap: float | None,
    with_gamma: bool,
    bias: Tensor | None,
) -> Gradients:
    """Return the gradients of ``blocked_forward``.

    Args:
        d_output: Cotangent of ``Y``, ``[B, H, T, E]``.
        d_mixed: Cotangent of ``U``, ``[B, H, T, E]``, or ``None`` for 0.
        query: As given forward.
        key: As given forward.
        value: As given forward.
        gamma: As given forward.
        halting: As given forward.
        mask: As given forward.
        mixed: From the record of the forward pass.
        off_read: From the record.
        log_sum: From the record.
        off_mass: From the record.
        kept: As given forward.
        scale: As given forward.
        softcap: As given forward.
        with_gamma: Whether the gradient of gamma is wanted.
        bias: The additive mask, if its gradient is wanted.

    Returns:
        Gradients in the dtype of the computation. Time and memory grow as those of the forward pass.
    """
    result = Gradients(
        query=query.new_zeros(query.shape),
        key=key.new_empty(key.shape),
        value=value.new_empty(value.shape),
        gamma=torch.zeros_like(gamma) if with_gamma else None,
        bias=None if bias is None else query.new_zeros(bias.shape),
    )
    everyone = slice(None)
    for rows in rows_together(query):
        d_bias = None
        if result.bias is not None:
            d_bias = mask.broadcast_of(result.bias[(None,) * (4 - result.bias.ndim)], rows, everyone)
        _sweep(
            Gradients(result.query[rows], result.key[rows], result.value[rows], result.gamma, d_bias),
            Tiles(query[rows], key[rows], mask.of(rows, everyone), scale=scale, softcap=softcap),
            value[rows],
            gamma,
            halting,
            Saved(d_output[rows], mixed[rows], off_read[rows], log_sum[rows], off_mass[rows]),
            None if d_mixed is None else d_mixed[rows],
            kept,
        )
    return result


def _sweep(
    into: Gradients,
    tiles: Tiles,
    value: Tensor,
    gamma: Tensor,
    halting: Tensor,
    given: Saved,
    d_mixed: Tensor | None,
    kept: bool,
) -> None:
    """Write the gradients of some batch rows; those of gamma and bias are added to.

    Args:
        into: Of these rows; the query's is 0.
        tiles: Their attention matrix.
        value: ``[b, G, T, E]``.
        gamma: ``[H]``.
        halting: ``[H]``.
        given: The record, with the cotangent of the output in the place of the output.
        d_mixed: Cotangent of ``U``.
        kept: Whether the diagonal takes part in the walk.
    """
    batch, heads, tokens, width = given.output.shape
    flat = (batch * heads, tokens, -1)
    alone = tiles.repeats == 1
    like = tiles.query
    sweep = _State(
        tiles=tiles,
        hop=by_head(gamma, batch),
        halt=by_head(halting, batch),
        kept=kept,
        value=value.reshape(-1, tokens, width),
        mixed=given.mixed.view(flat),
        off_read=given.off_read.view(flat),
        log_sum=given.log_sum.view(flat),
        off_mass=given.off_mass.view(flat),
        d_output=given.output.reshape(flat),
        d_mixed=None if d_mixed is None else d_mixed.reshape(flat),
        # where every query head has its own key, at the place of the result
        x=into.value.view(flat) if alone else like.new_empty(batch * heads, tokens, width),
        z=like.new_empty(batch * heads, tokens, width),
        delta=like.new_empty(batch * heads, tokens, 1),
        d_query=into.query.view(flat),
        d_key=into.key.view(flat) if alone else like.new_empty(like.shape),
        d_gamma=None if into.gamma is None else like.new_zeros(batch * heads),
        d_bias=into.bias,
    )
    block = block_of(tiles.mask)
    largest = (batch * heads, min(_TILE, tokens))
    tiles.space.take("products", *largest, max(block, like.shape[-1]))
    tiles.space.take("cotangents", *largest, block)
    for start in reversed(range(0, tokens, block)):
        columns = slice(start, min(start + block, tokens))
        _take_block(sweep, columns)
    sweep.x.mul_(sweep.halt)
    if not alone:
        for gathered, target in ((sweep.d_key, into.key), (sweep.x, into.value)):
            target.copy_(over_group(gathered, tiles.repeats).view(target.shape))
    if into.gamma is not None and sweep.d_gamma is not None:
        into.gamma.add_(sweep.d_gamma.view(batch, heads).sum(0))


def over_group(gradient: Tensor, repeats: int) -> Tensor:
    """Return the sum over the query heads that share a key head, without a copy if each has its own."""
    return gradient if repeats == 1 else gradient.unflatten(0, (-1, repeats)).sum(1)


def d_gamma_of(x: Tensor, walked: Tensor, value: Tensor) -> Tensor:
    """Return ``<x, A_c U - V>`` of every query head, ``[N]``.

    Args:
        x: ``[N, rows, E]``.
        walked: ``A_c U``, ``[N, rows, E]``.
        value: ``[B * G, rows, E]``, not repeated for the query heads that share it.
    """
    by_group = (len(value), -1)
    return (x * (walked.unflatten(0, by_group) - value.unsqueeze(1)).flatten(0, 1)).sum((1, 2))


def _take_block(sweep: _State, columns: slice) -> None:
    """Bring the sweep past one block of columns: its rows of x, z and delta, and all its gradients."""
    tiles, mixed = sweep.tiles, sweep.mixed[:, columns]
    key = tiles.repeated_key(columns)
    d_key = torch.zeros_like(key)
    arriving = torch.zeros_like(mixed) if sweep.d_mixed is None else sweep.d_mixed[:, columns].clone()
    stop = tiles.mask.query_stop(columns.start, columns.stop)
    # the tile with the diagonal comes last: it needs what arrives from below
    starts = range(columns.start, stop, _TILE)
    for begin in reversed(starts):
        rows = slice(begin, min(begin + _TILE, stop))
        weights, slope = tiles.weights(rows, columns, sweep.log_sum)
        height, d_own = columns.stop - columns.start if begin == columns.start else 0, None
        if weights.shape[1] > height:
            arriving.baddbmm_(weights[:, height:].mT, sweep.z[:, begin + height : rows.stop])
        if height:
            d_own = _solve_transposed(sweep, columns, weights[:, :height], arriving)
        space = tiles.space.take("cotangents", *weights.shape)
        d_logits = through_softmax(weights, sweep.z[:, rows], sweep.delta[:, rows], mixed, d_own, out=space)
        _spread(sweep, rows, columns, d_logits, slope, key, d_key)
    sweep.d_key[:, columns] = d_key


def _solve_transposed(sweep: _State, rows: slice, weights: Tensor, arriving: Tensor) -> Tensor:
    """Solve the diagonal block, and return the cotangent of its diagonal logits, ``[N, rows, 1]``.

    Args:
        sweep: The sweep; its x, z and delta of these rows are written, and the gradient of gamma is added to.
        rows: Which rows.
        weights: Attention of these rows to one another, ``[N, rows, rows]``.
        arriving: ``A^T z`` of the rows below plus the cotangent of U, ``[N, rows, E]``; used up.
    """
    own = weights.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    d_output, mixed, off_read = sweep.d_output[:, rows], sweep.mixed[:, rows], sweep.off_read[:, rows]
    off_mass = sweep.off_mass[:, rows]
    pivot = pivots(own, off_mass, sweep.hop, sweep.halt, kept=sweep.kept, plain=sweep.tiles.mask.plain)
    system = triangular_system(weights, pivot, sweep.hop, out=sweep.tiles.space.take("system", *weights.shape))
    x = arriving.baddbmm_(weights.mT, d_output)
    solve_columns_(system, x)
    z = torch.addcmul(d_output, x, sweep.hop)
    delta, d_own = row_sums(own, off_mass, z, d_output, mixed, off_read, kept=sweep.kept)
    if sweep.d_gamma is not None:
        walked = torch.addcmul(off_read, own, mixed) if sweep.kept else off_read
        sweep.d_gamma.add_(d_gamma_of(x, walked, sweep.value[:, rows]))
    sweep.x[:, rows], sweep.z[:, rows], sweep.delta[:, rows] = x, z, delta
    return d_own


def _spread(
    sweep: _State, rows: slice, columns: slice, d_logits: Tensor, slope: Tensor | None, key: Tensor, d_key: Tensor
) -> None:
    """Add the cotangent of a tile of logits ``[N, rows, columns]`` to the gradients of bias, query and key.

    The weights of the tile are overwritten.
    """
    tiles = sweep.tiles
    if sweep.d_bias is not None:
        part = tiles.mask.tile_of(sweep.d_bias, rows, columns)
        part.add_(d_logits.unflatten(0, (-1, tiles.heads)).sum_to_size(part.shape))
    if slope is not None:
        d_logits.mul_(slope)
    # a product into rows of a larger tensor would be done head by head; the weights are not needed any more
    product = torch.bmm(d_logits, key, out=tiles.space.take("products", *d_logits.shape[:2], key.shape[-1]))
    sweep.d_query[:, rows].add_(product, alpha=tiles.scale)
    d_key.baddbmm_(d_logits.mT, tiles.query[:, rows], alpha=tiles.scale)
