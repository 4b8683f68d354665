"""Dropout on the read-out ``Y = A U``, with memory linear in the number of tokens.

Inside the walk dropout is not defined: it could remove a pivot of the solve. Outside it is ordinary dropout of
attention weights, with ``U`` in the place of values. Which weights fall is drawn again in the backward pass, from the
same seed.
"""

from typing import Any

import torch
from torch import Tensor

from hf_chainattn.masks import AttentionMask
from hf_chainattn.operator import no_second_derivative
from hf_chainattn.precision import without_autocast
from hf_chainattn.tiles import Tiles

# query rows at a time
_ROWS = 64


def draw_seed(generator: torch.Generator | None) -> Tensor:
    """Return a random seed, ``[]``, int64; it advances ``generator``, or torch's own generator of the CPU."""
    device = "cpu" if generator is None else generator.device
    return torch.randint(2**62, (), generator=generator, device=device)


@torch.library.custom_op("hf_chainattn::read_out_with_dropout", mutates_args=())
def read_out_with_dropout(
    query: Tensor,
    key: Tensor,
    mixed: Tensor,
    log_sum: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    segment_ids: Tensor | None,
    window: int | None,
    is_causal: bool,
    scale: float,
    softcap: float | None,
    dropout_p: float,
    seed: Tensor,
) -> Tensor:
    """Return ``drop(A) U``, ``[B, H, T, E]``, in the dtype of ``mixed``.

    Args:
        query: ``[B, H, T, D]``.
        key: ``[B, H_kv, T, D]``.
        mixed: ``U``, ``[B, H, T, E]``.
        log_sum: ``[B, H, T, 1]``, as the operator of chain attention returns it; no gradient of its own.
        attn_mask: As for that operator, as the next six.
        key_padding_mask: ``[B, T]``.
        segment_ids: ``[B, T]``.
        window: Tokens within reach.
        is_causal: Whether later keys are hidden where ``attn_mask`` leaves it open.
        scale: Factor on the logits.
        softcap: Bound on the logits.
        dropout_p: Chance of each weight to fall; the others grow by ``1 / (1 - dropout_p)``.
        seed: From ``draw_seed``.
    """
    mask = AttentionMask(attn_mask, key_padding_mask, segment_ids, window, is_causal=is_causal, tokens=query.shape[2])
    output = torch.empty_like(mixed)
    with without_autocast(query):
        tiles = Tiles(query.to(mixed.dtype), key.to(mixed.dtype), mask, scale=scale, softcap=softcap)
        values, sums, target = (tensor.flatten(0, 1) for tensor in (mixed, log_sum, output))
        for rows, columns in _panels(mask):
            weights, _ = tiles.weights(rows, columns, sums)
            kept = _kept(weights, dropout_p, seed, rows.start)
            target[:, rows] = torch.bmm(weights.mul_(kept), values[:, columns])
    return output


@torch.library.custom_op("hf_chainattn::read_out_with_dropout_backward", mutates_args=())
def _backward_operator(
    d_output: Tensor,
    query: Tensor,
    key: Tensor,
    mixed: Tensor,
    log_sum: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    segment_ids: Tensor | None,
    seed: Tensor,
    window: int | None,
    is_causal: bool,
    scale: float,
    softcap: float | None,
    dropout_p: float,
    with_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of query, key, ``U`` and additive mask, the last one empty if not asked for."""
    mask = AttentionMask(attn_mask, key_padding_mask, segment_ids, window, is_causal=is_causal, tokens=query.shape[2])
    d_bias = mixed.new_zeros(attn_mask.shape if with_bias and attn_mask is not None else 0)
    with without_autocast(query):
        tiles = Tiles(query.to(mixed.dtype), key.to(mixed.dtype), mask, scale=scale, softcap=softcap)
        values, sums, upstream = (tensor.flatten(0, 1) for tensor in (mixed, log_sum, d_output.to(mixed.dtype)))
        d_mixed, d_query = torch.zeros_like(values), torch.zeros_like(tiles.query)
        d_key = torch.zeros_like(tiles.query)
        for rows, columns in _panels(mask):
            weights, slope = tiles.weights(rows, columns, sums)
            kept = _kept(weights, dropout_p, seed, rows.start)
            d_mixed[:, columns].baddbmm_((weights * kept).mT, upstream[:, rows])
            d_logits = torch.bmm(upstream[:, rows], values[:, columns].mT).mul_(kept).mul_(weights)
            d_logits.addcmul_(weights, d_logits.sum(-1, keepdim=True), value=-1)
            if with_bias:
                part = mask.tile_of(d_bias, rows, columns)
                part.add_(d_logits.unflatten(0, query.shape[:2]).sum_to_size(part.shape))
            if slope is not None:
                d_logits.mul_(slope)
            d_query[:, rows].baddbmm_(d_logits, tiles.repeated_key(columns), alpha=scale)
            d_key[:, columns].baddbmm_(d_logits.mT, tiles.query[:, rows], alpha=scale)
    d_bias = d_bias if attn_mask is None or not with_bias else d_bias.to(attn_mask.dtype)
    d_key = d_key.view(*key.shape[:2], -1, *key.shape[2:]).sum(2)
    return d_query.view(query.shape).to(query.dtype), d_key.to(key.dtype), d_mixed.view(mixed.shape), d_bias


def _panels(mask: AttentionMask) -> list[tuple[slice, slice]]:
    """Return row blocks and, for each, the keys that it may see."""
    panels = []
    for start in range(0, mask.tokens, _ROWS):
        stop = min(start + _ROWS, mask.tokens)
        columns = slice(mask.first_key(start, stop), stop) if mask.triangular else slice(0, mask.tokens)
        panels.append((slice(start, stop), columns))
    return panels


def _kept(weights: Tensor, dropout_p: float, seed: Tensor, row: int) -> Tensor:
    """Return 0 where a weight falls, else ``1 / (1 - dropout_p)``; the same for the same seed and row."""
    generator = torch.Generator(weights.device).manual_seed((int(seed) + row) % 2**63)
    kept = torch.empty_like(weights).bernoulli_(1 - dropout_p, generator=generator)
    return kept.div_(1 - dropout_p)


@read_out_with_dropout.register_fake
def _(query: Tensor, key: Tensor, mixed: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(mixed)


@_backward_operator.register_fake
def _(
    d_output: Tensor,
    query: Tensor,
    key: Tensor,
    mixed: Tensor,
    log_sum: Tensor,
    attn_mask: Tensor | None,
    *others: Any,
) -> tuple[Tensor, ...]:
    bias = mixed.new_empty(0) if attn_mask is None or not others[-1] else attn_mask.new_empty(attn_mask.shape)
    return query.new_empty(query.shape), key.new_empty(key.shape), mixed.new_empty(mixed.shape), bias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401
    *tensors, window, is_causal, scale, softcap, dropout_p, seed = inputs
    ctx.save_for_backward(*tensors, seed)
    ctx.settings = (window, is_causal, scale, softcap, dropout_p)


def _backward(ctx: Any, d_output: Tensor) -> tuple[Any, ...]:  # noqa: ANN401
    with_bias = ctx.needs_input_grad[4]
    query, key, mixed, bias = _backward_operator(d_output, *ctx.saved_tensors, *ctx.settings, with_bias)
    return query, key, mixed, None, bias if with_bias else None, *(None,) * 8


read_out_with_dropout.register_autograd(_backward, setup_context=_setup_context)
_backward_operator.register_autograd(no_second_derivative)
