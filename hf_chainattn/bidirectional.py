"""Chain attention where tokens see later ones: the whole attention matrix of some heads at a time, and a solve.

A token that nobody sees cannot change the others. It leaves the system, and its ``U`` is read off the solution of the
rest, so that what stands in padding is not felt in a single bit.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hf_chainattn.blocked import Saved
from hf_chainattn.blocked_backward import Gradients, d_gamma_of
from hf_chainattn.masks import AttentionMask
from hf_chainattn.solvers import System, solve
from hf_chainattn.tiles import Tiles

# elements of the attention matrices that are held at a time, one head at least: 64 MiB in float32. With system,
# factors and copies the peak is four to seven times that, whatever the batch, and one more with a softcap
_ELEMENTS = 2**24


class _Heads(NamedTuple):
    """Some heads of some batch rows; ``N`` is their number.

    Args:
        rows: Which batch rows.
        heads: Which heads.
        shape: ``[rows, heads]``.
        repeats: Query heads of each key head.
    """

    rows: slice
    heads: slice
    shape: tuple[int, int]
    repeats: int

    def of(self, tensor: Tensor) -> Tensor:
        """Return the part of ``[B, H, ...]`` as ``[N, ...]``."""
        return tensor[self.rows, self.heads].flatten(0, 1)

    def of_groups(self, tensor: Tensor) -> Tensor:
        """Return the part of ``[B, G, ...]``, once for each query head, as ``[rows, heads, ...]``."""
        return tensor[self.rows, [head // self.repeats for head in range(self.heads.start, self.heads.stop)]]

    def of_numbers(self, numbers: Tensor) -> Tensor:
        """Return the part of ``[H]`` as ``[N, 1, 1]``."""
        return numbers[self.heads].repeat(self.shape[0]).view(-1, 1, 1)


def _parts(query: Tensor, groups: int) -> Iterator[_Heads]:
    """Yield heads to be held together until all were: whole batch rows if a row fits in, else heads of one row."""
    batch, heads, tokens, _ = query.shape
    at_once = max(1, _ELEMENTS // max(1, tokens * tokens))
    height, breadth = max(1, at_once // heads), min(at_once, heads)
    for row in range(0, batch, height):
        for head in range(0, heads, breadth):
            rows, columns = slice(row, min(row + height, batch)), slice(head, min(head + breadth, heads))
            yield _Heads(rows, columns, (rows.stop - row, columns.stop - head), heads // groups)


def full_forward(
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
    tolerance: float | None,
    on_inexact: str,
) -> Saved:
    """Return chain attention under any mask.

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
        tolerance: Of the solve, see ``hf_chainattn.solvers.solve``.
        on_inexact: Likewise.

    Returns:
        The output and its record. Time O(T^2 (D + E + T)), memory O(T^2): see ``_ELEMENTS``.

    Raises:
        InexactSolveError: If a solve is not within the tolerance and ``on_inexact`` is ``"raise"``.
    """
    width = value.shape[-1]
    saved = Saved(*(value.new_empty(*query.shape[:3], size) for size in (width, width, width, 1, 1)))
    for part in _parts(query, key.shape[1]):
        here = part.rows, part.heads
        tiles = Tiles(query[here], part.of_groups(key), mask.of(part.rows, part.heads), scale=scale, softcap=softcap)
        off, own, log_sum = _softmax(tiles)
        hop, halt = part.of_numbers(gamma), part.of_numbers(halting)
        system, unseen, off_mass = _system(off, own, hop, halt, kept=kept)
        right = halt * part.of_groups(value).flatten(0, 1)
        given = right.masked_fill(unseen, 0.0)
        mixed, off_read = solve(system, given, adjoint=False, tolerance=tolerance, on_inexact=on_inexact)
        mixed = torch.where(unseen, torch.addcmul(right, off_read, hop), mixed)
        output = torch.addcmul(off_read, own, mixed)
        for target, result in zip(saved, (output, mixed, off_read, log_sum, off_mass), strict=True):
            target[here] = result.unflatten(0, part.shape)
        # or they would still be there when those of the next heads are made
        del tiles, off, system
    return saved


def _softmax(tiles: Tiles) -> tuple[Tensor, Tensor, Tensor]:
    """Return attention to the others ``[N, T, T]``, to oneself ``[N, T, 1]``, and the log in base 2 of each row's sum.

    The first lies in the memory of the tiles. Rows that see nothing are 0, and their log is ``inf``.
    """
    everything = slice(0, tiles.query.shape[1])
    logits = tiles.logits(everything, everything)
    peak = logits.amax(-1, keepdim=True).clamp_(min=torch.finfo(logits.dtype).min)
    weights = logits.sub_(peak).exp2_()
    own, total = _normalise_(weights)
    log_sum = (peak + total.log2()).masked_fill(total == 0, torch.inf)
    return weights, own, log_sum


def _normalise_(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Divide each row ``[N, T, T]`` by its sum if that is not 0, and write 0 on the diagonal, in place.

    The backward pass does this too: the logs of the sums, being rounded, would make each row wrong by a factor.

    Returns:
        The diagonal as it would be, and the sums, ``[N, T, 1]``.
    """
    diagonal = weights.diagonal(dim1=-2, dim2=-1)
    own = diagonal.unsqueeze(-1).clone()
    diagonal.zero_()
    total = weights.sum(-1, keepdim=True) + own
    divisor = total.masked_fill(total == 0, 1.0)
    weights.div_(divisor)
    return own / divisor, total


def _system(off: Tensor, own: Tensor, hop: Tensor, halt: Tensor, *, kept: bool) -> tuple[System, Tensor, Tensor]:
    """Return the system of the tokens that somebody sees, where the others are, and the attention to others.

    Args:
        off: ``[N, T, T]``, attention with a zero diagonal.
        own: ``[N, T, 1]``, its diagonal.
        hop: ``[N, 1, 1]``, gamma.
        halt: ``[N, 1, 1]``, ``1 - gamma``.
        kept: Whether the diagonal takes part in the walk.
    """
    off_mass = off.sum(-1, keepdim=True)
    unseen = (off.amax(-2).unsqueeze(-1) == 0) & (own == 0)
    alone = unseen | (own + off_mass == 0)
    # 1 - gamma * own and 1 as sums of positive terms, since a row sums to 1 unless it sees nothing: what rounding has
    # done to the sum of the row is done to the pivot too, and the difference, 1 - gamma at least, keeps its digits
    pivot = halt + hop * (off_mass if kept else off_mass + own)
    pivot = pivot.masked_fill(alone, 1.0)
    return System(off, hop.expand_as(own).masked_fill(unseen, 0.0), pivot), unseen, off_mass


def full_backward(
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
    tolerance: float | None,
    on_inexact: str,
) -> Gradients:
    """Return the gradients of ``full_forward``.

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
        off_mass: From the record; not used, because the system needs the mass of the weights as they are here.
        kept: As given forward.
        scale: As given forward.
        softcap: As given forward.
        with_gamma: Whether the gradient of gamma is wanted.
        bias: The additive mask, if its gradient is wanted.
        tolerance: Of the solve, as forward.
        on_inexact: Likewise.

    Returns:
        Gradients in the dtype of the computation. Time and memory grow as those of the forward pass.

    Raises:
        InexactSolveError: If a solve is not within the tolerance and ``on_inexact`` is ``"raise"``.
    """
    batch, heads, tokens, _ = query.shape
    everything = slice(0, tokens)
    # of key and value for every query head; those that share one are added at the end
    d_query, d_key, d_value = (like.new_empty(like.shape) for like in (query, query, mixed))
    d_gamma = gamma.new_empty(batch, heads) if with_gamma else None
    d_bias = None if bias is None else query.new_zeros(bias.shape)
    for part in _parts(query, key.shape[1]):
        here = part.rows, part.heads
        tiles = Tiles(query[here], part.of_groups(key), mask.of(part.rows, part.heads), scale=scale, softcap=softcap)
        off, slope = tiles.weights(everything, everything, part.of(log_sum))
        own, _ = _normalise_(off)
        hop, halt = part.of_numbers(gamma), part.of_numbers(halting)
        system, unseen, off_mass = _system(off, own, hop, halt, kept=kept)
        upstream, values, read = part.of(d_output), part.of(mixed), part.of(off_read)
        arriving = torch.baddbmm(own * upstream, off.mT, upstream)
        if d_mixed is not None:
            arriving += part.of(d_mixed)
            # the U of unseen tokens was read off, not solved for
            arriving += hop * torch.bmm(off.mT, arriving.masked_fill(~unseen, 0.0))
        x, _ = solve(system, arriving, adjoint=True, tolerance=tolerance, on_inexact=on_inexact)
        if d_gamma is not None:
            walked = torch.addcmul(read, own, values) if kept else read
            d_gamma[here] = d_gamma_of(x, walked, part.of_groups(value).flatten(0, 1)).view(part.shape)
        d_value[here] = (halt * x).unflatten(0, part.shape)
        d_logits = _d_logits(off, own, off_mass, torch.addcmul(upstream, x, hop), upstream, values, read, kept=kept)
        if d_bias is not None:
            target = mask.broadcast_of(d_bias[(None,) * (4 - d_bias.ndim)], part.rows, part.heads)
            target += d_logits.unflatten(0, part.shape).sum_to_size(target.shape)
        if slope is not None:
            d_logits *= slope
        d_logits *= scale
        d_query[here] = torch.bmm(d_logits, tiles.key).unflatten(0, part.shape)
        d_key[here] = torch.bmm(d_logits.mT, tiles.query).unflatten(0, part.shape)
        # or they would still be there when those of the next heads are made
        del tiles, off, slope, system, d_logits
    by_group = (batch, key.shape[1], heads // key.shape[1], tokens)
    return Gradients(
        query=d_query,
        key=d_key.view(*by_group, key.shape[-1]).sum(2),
        value=d_value.view(*by_group, value.shape[-1]).sum(2),
        gamma=None if d_gamma is None else d_gamma.sum(0),
        bias=d_bias,
    )


def _d_logits(
    off: Tensor,
    own: Tensor,
    off_mass: Tensor,
    z: Tensor,
    d_output: Tensor,
    mixed: Tensor,
    off_read: Tensor,
    *,
    kept: bool,
) -> Tensor:
    """Return the cotangent of the logits, ``[N, T, T]``, softcapped and with bias.

    Args:
        off: ``[N, T, T]``, attention with a zero diagonal.
        own: ``[N, T, 1]``, its diagonal.
        off_mass: ``[N, T, 1]``, sums of the rows of ``off``.
        z: ``[N, T, E]``; the cotangent of a weight off the diagonal is ``z u``.
        d_output: ``[N, T, E]``; that of a diagonal weight is ``z u`` too, or ``dY u`` if the walk leaves it out.
        mixed: ``[N, T, E]``, ``U``.
        off_read: ``[N, T, E]``.
        kept: Whether the diagonal takes part in the walk.
    """
    # the same number less for each weight of a row changes nothing, and near gamma = 1, where all U are alike, saves
    # digits; the mean of Y has nothing of what stands in padding
    middle = torch.addcmul(off_read, own, mixed).mean(1, keepdim=True)
    shifted = mixed - middle
    of_own = (z * shifted).sum(-1, keepdim=True)
    if not kept:
        of_own = (d_output * mixed - z * middle).sum(-1, keepdim=True)
    d_logits = torch.bmm(z, shifted.mT).mul_(off)
    of_others = d_logits.sum(-1, keepdim=True)
    d_logits.addcmul_(off, torch.addcmul(of_others, own, of_own), value=-1)
    # of_own - (of_others + own * of_own) with 1 - own replaced by the mass of the others, which does not cancel
    diagonal = own * (off_mass * of_own - of_others)
    d_logits.diagonal(dim1=-2, dim2=-1).copy_(diagonal.squeeze(-1))
    return d_logits
