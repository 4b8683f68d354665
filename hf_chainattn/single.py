"""Chain attention of short sequences, which are one block: the formulas of many blocks with nothing above or below.

Here the time goes into starting operations, not into them, so as few as possible are started.
"""

import torch
from torch import Tensor

from hf_chainattn.block import (
    attend,
    by_head,
    pivots,
    row_sums,
    solve_columns_,
    solve_rows_,
    through_softmax,
    triangular_system,
)
from hf_chainattn.blocked import Saved
from hf_chainattn.blocked_backward import Gradients, d_gamma_of, over_group
from hf_chainattn.masks import AttentionMask
from hf_chainattn.tiles import Tiles

# up to so many tokens one block is faster than several
SHORT = 128


def single_forward(
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
    """Return what ``blocked_forward`` returns, from the whole attention matrix: memory O(T^2), for ``T`` up to 128."""
    batch, heads, tokens, _ = query.shape
    tiles = Tiles(query, key, mask, scale=scale, softcap=softcap)
    hop, halt = by_head(gamma, batch), by_head(halting, batch)
    weights, total, own, off, _, log_sum = attend(tiles, slice(0, tokens))
    weights.div_(total)
    # what callers get is no view, so that they may change it in place
    mixed = value.new_empty(batch, heads, tokens, value.shape[-1])
    torch.mul(_repeated(value, tiles.repeats), halting.view(-1, 1, 1), out=mixed)
    rows = mixed.view(-1, tokens, value.shape[-1])
    pivot = pivots(own, off, hop, halt, kept=kept, plain=mask.plain)
    solve_rows_(triangular_system(weights, pivot, hop), rows)
    read, log_sum, off, own = (
        part.view(batch, heads, tokens, -1) for part in (torch.bmm(weights, rows), log_sum, off, own)
    )
    return Saved(torch.addcmul(read, own, mixed), mixed, read, log_sum, off)


def single_backward(
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
    """Return the gradients of ``single_forward``; the arguments are those of ``blocked_backward``."""
    batch, heads, tokens, _ = query.shape
    tiles, everything = Tiles(query, key, mask, scale=scale, softcap=softcap), slice(0, tokens)
    hop, halt = by_head(gamma, batch), by_head(halting, batch)
    upstream, values, read, sums, off = (part.flatten(0, 1) for part in (d_output, mixed, off_read, log_sum, off_mass))
    weights, slope = tiles.weights(everything, everything, sums)
    own = weights.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    pivot = pivots(own, off, hop, halt, kept=kept, plain=mask.plain)
    x = torch.bmm(weights.mT, upstream)
    if d_mixed is not None:
        x += d_mixed.flatten(0, 1)
    solve_columns_(triangular_system(weights, pivot, hop), x)
    z = torch.addcmul(upstream, x, hop)
    delta, d_own = row_sums(own, off, z, upstream, values, read, kept=kept)
    d_logits = through_softmax(weights, z, delta, values, d_own)
    d_gamma = d_bias = None
    if with_gamma:
        walked = torch.addcmul(read, own, values) if kept else read
        d_gamma = d_gamma_of(x, walked, value.flatten(0, 1)).view(batch, heads).sum(0)
    if bias is not None:
        d_bias = d_logits.unflatten(0, (batch, heads)).sum_to_size(bias.shape)
    if slope is not None:
        # not in place: where nothing was to be summed, the gradient of the bias is this tensor
        d_logits = d_logits * slope
    # the first argument is not read, since beta is 0
    d_query = torch.baddbmm(tiles.query, d_logits, tiles.repeated_key(everything), beta=0, alpha=scale)
    d_key = torch.baddbmm(tiles.query, d_logits.mT, tiles.query, beta=0, alpha=scale)
    return Gradients(
        query=d_query.view(query.shape),
        key=over_group(d_key, tiles.repeats).view(key.shape),
        value=over_group(x.mul_(halt), tiles.repeats).view(value.shape),
        gamma=d_gamma,
        bias=d_bias,
    )


def _repeated(value: Tensor, repeats: int) -> Tensor:
    """Return values ``[B, G, T, E]`` once for every query head that reads them."""
    return value if repeats == 1 else value.repeat_interleave(repeats, 1)
