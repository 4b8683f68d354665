"""Chain attention as one operator of PyTorch, opaque to the compiler, with its hand-written derivative.

``torch.ops.hf_chainattn.chain_attention`` and its backward. What a mask means depends on its values, so it is read in
here, at run time: a traced graph stays right for every mask.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_chainattn.bidirectional import full_backward, full_forward
from hf_chainattn.blocked import Saved, blocked_forward
from hf_chainattn.blocked_backward import Gradients, blocked_backward
from hf_chainattn.masks import AttentionMask
from hf_chainattn.precision import without_autocast
from hf_chainattn.single import SHORT, single_backward, single_forward


@torch.library.custom_op("hf_chainattn::chain_attention", mutates_args=())
def chain_attention_operator(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gamma: Tensor,
    halting: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    segment_ids: Tensor | None,
    window: int | None,
    is_causal: bool,
    kept: bool,
    scale: float,
    softcap: float | None,
    must_block: bool,
    tolerance: float | None,
    on_inexact: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return ``Y`` in the dtype of ``value``, and ``U``, ``A U`` without the diagonal, and two sums of each row.

    Args:
        query: ``[B, H, T, D]``.
        key: ``[B, H_kv, T, D]``.
        value: ``[B, H_kv, T, E]``.
        gamma: ``[H]``, in the dtype of the computation.
        halting: ``1 - gamma``, likewise; no gradient of its own.
        attn_mask: See ``hf_chainattn.masks.AttentionMask``, as the next four.
        key_padding_mask: ``[B, T]``.
        segment_ids: ``[B, T]``.
        window: Tokens within reach.
        is_causal: Whether later keys are hidden where ``attn_mask`` leaves it open.
        kept: Whether the diagonal takes part in the walk.
        scale: Factor on the logits.
        softcap: Bound on the logits.
        must_block: Refuse a mask that lets a token see a later one.
        tolerance: Of the solve where tokens see later ones; see ``hf_chainattn.bidirectional``, as the next.
        on_inexact: ``"raise"`` or ``"warn"``.
    """
    mask = AttentionMask(attn_mask, key_padding_mask, segment_ids, window, is_causal=is_causal, tokens=query.shape[2])
    if must_block and not mask.triangular:
        raise ValueError("impl='blocked' needs a mask in which no token sees a later one: use impl='auto' or 'dense'.")
    forward: Callable[..., Saved] = single_forward if mask.tokens <= SHORT else blocked_forward
    if not mask.triangular:
        forward = functools.partial(full_forward, tolerance=tolerance, on_inexact=on_inexact)
    with without_autocast(query):
        saved = forward(
            *(tensor.to(gamma.dtype) for tensor in (query, key, value)),
            gamma,
            halting,
            mask,
            kept=kept,
            scale=scale,
            softcap=softcap,
        )
    return saved.output.to(value.dtype), *saved[1:]


@torch.library.custom_op("hf_chainattn::chain_attention_backward", mutates_args=())
def _backward_operator(
    d_output: Tensor | None,
    d_mixed: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gamma: Tensor,
    halting: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    segment_ids: Tensor | None,
    mixed: Tensor,
    off_read: Tensor,
    log_sum: Tensor,
    off_mass: Tensor,
    window: int | None,
    is_causal: bool,
    kept: bool,
    scale: float,
    softcap: float | None,
    must_block: bool,
    tolerance: float | None,
    on_inexact: str,
    with_gamma: bool,
    with_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of query, key, value, gamma and additive mask, the last two empty if not asked for."""
    mask = AttentionMask(attn_mask, key_padding_mask, segment_ids, window, is_causal=is_causal, tokens=query.shape[2])
    backward: Callable[..., Gradients] = single_backward if mask.tokens <= SHORT else blocked_backward
    if not mask.triangular:
        backward = functools.partial(full_backward, tolerance=tolerance, on_inexact=on_inexact)
    dtype = gamma.dtype
    with without_autocast(query):
        gradients = backward(
            torch.zeros_like(mixed) if d_output is None else d_output.to(dtype),
            None if d_mixed is None else d_mixed.to(dtype),
            *(tensor.to(dtype) for tensor in (query, key, value)),
            gamma,
            halting,
            mask,
            mixed,
            off_read,
            log_sum,
            off_mass,
            kept=kept,
            scale=scale,
            softcap=softcap,
            with_gamma=with_gamma,
            bias=attn_mask if with_bias else None,
        )
    bias = gamma.new_empty(0) if gradients.bias is None or attn_mask is None else gradients.bias.to(attn_mask.dtype)
    return (
        gradients.query.to(query.dtype),
        gradients.key.to(key.dtype),
        gradients.value.to(value.dtype),
        gamma.new_empty(0) if gradients.gamma is None else gradients.gamma,
        bias,
    )


@chain_attention_operator.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, gamma: Tensor, *others: Any) -> tuple[Tensor, ...]:
    batch, heads, tokens, _ = query.shape
    width = value.shape[-1]
    return (
        value.new_empty(batch, heads, tokens, width),
        *(gamma.new_empty(batch, heads, tokens, size) for size in (width, width, 1, 1)),
    )


@_backward_operator.register_fake
def _(
    d_output: Tensor | None,
    d_mixed: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gamma: Tensor,
    halting: Tensor,
    attn_mask: Tensor | None,
    *others: Any,
) -> tuple[Tensor, ...]:
    *_, with_gamma, with_bias = others
    nothing = gamma.new_empty(0)
    bias = attn_mask if with_bias and attn_mask is not None else nothing
    given = (query, key, value, gamma if with_gamma else nothing, bias)
    return tuple(tensor.new_empty(tensor.shape) for tensor in given)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ANN401
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:8], *output[1:])
    ctx.settings = inputs[8:]


def _backward(ctx: Any, d_output: Tensor | None, d_mixed: Tensor | None, *others: Any) -> tuple[Any, ...]:  # noqa: ANN401
    _, _, _, with_gamma, _, with_bias, *_ = ctx.needs_input_grad
    *gradients, gamma, bias = _backward_operator(
        d_output, d_mixed, *ctx.saved_tensors, *ctx.settings, with_gamma, with_bias
    )
    return *gradients, gamma if with_gamma else None, None, bias if with_bias else None, *(None,) * 10


def no_second_derivative(ctx: Any, *cotangents: Any) -> None:  # noqa: ANN401
    """Refuse to differentiate a backward operator: its derivative."""
    raise NotImplementedError(
        "Blocked chain attention has no second derivative: differentiate chain_attention(..., impl='dense') twice."
    )


chain_attention_operator.register_autograd(_backward, setup_context=_setup_context)


def differentiable(*arguments: Any) -> Any:  # noqa: ANN401  as the operator
    """Return what the operator returns, by a shorter way to the same derivative where nothing is compiled."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return chain_attention_operator(*arguments)
    wanted = any(isinstance(argument, Tensor) and argument.requires_grad for argument in arguments)
    return (_Eager.apply if wanted else chain_attention_operator)(*arguments)


class _Eager(torch.autograd.Function):
    """The operator with its derivative; what ``register_autograd`` makes of them takes 0.2 ms to look up defaults."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:  # noqa: ANN401
        output: tuple[Tensor, ...] = chain_attention_operator(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> tuple[Any, ...]:  # noqa: ANN401
        return _backward(ctx, *cotangents)


_backward_operator.register_autograd(no_second_derivative)
