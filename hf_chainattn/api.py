"""The public function: checks its arguments, chooses an implementation, and lets it compute."""

import numbers
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

from hf_chainattn.arguments import check_shapes, gamma_and_halting
from hf_chainattn.config import check_diagonal
from hf_chainattn.dense import dense_chain_attention
from hf_chainattn.dropout import draw_seed, read_out_with_dropout
from hf_chainattn.masks import AttentionMask, check_masks
from hf_chainattn.operator import differentiable
from hf_chainattn.precision import without_autocast
from hf_chainattn.reference import chain_attention_reference

Implementation = Literal["auto", "blocked", "dense", "reference"]
OnInexact = Literal["raise", "warn"]


def chain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    gamma: float | Tensor,
    diagonal: str = "kept",
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    window: int | None = None,
    segment_ids: Tensor | None = None,
    softcap: float | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
    impl: Implementation = "auto",
    return_u: bool = False,
    tolerance: float | None = None,
    on_inexact: OnInexact = "raise",
) -> Any:  # noqa: ANN401  a tensor, or two with return_u
    r"""Chain attention, ``Y = (1 - gamma) A (I - gamma A_c)^-1 V`` with ``A`` the softmax attention of each head.

    A drop-in for ``torch.nn.functional.scaled_dot_product_attention`` where queries and keys are the same tokens. One
    call follows references of any depth: hop ``k`` enters with weight ``(1 - gamma) gamma^(k-1)``.

    Letters: ``B`` batch, ``H`` query heads, ``H_kv`` key heads (a divisor of ``H``), ``T`` tokens, ``D`` key width,
    ``E`` value width.

    Args:
        query: ``[B, H, T, D]``. All three must be finite, also where they are hidden: ``0 * nan`` is ``nan``.
        key: ``[B, H_kv, T, D]``.
        value: ``[B, H_kv, T, E]``.
        gamma: Chance of one more hop, in ``[0, 1)``: a number, or a tensor of shape ``[H]`` or ``[1]``, which may
            require gradients. Tensor values are not checked, so that no device is waited for; in bfloat16 0.999 is 1.
        diagonal: ``"kept"``: ``A_c = A``; ``"removed"``: ``A_c`` is ``A`` with a zero diagonal.
        attn_mask: Boolean (True = visible) or additive, broadcastable to ``[B, H, T, T]``. In an additive mask,
            ``-inf``, and anything at or below half of the most negative number of its dtype, hides the key. A row that
            sees nothing gives 0. Gradients reach an additive mask in its own shape.
        key_padding_mask: ``[B, T]``, boolean or integer; True or 1 = a key that may be seen, as in a tokenizer's
            ``attention_mask``.
        window: A token sees itself and the ``window - 1`` tokens before it; without a causal mask, after it too.
        segment_ids: ``[B, T]``, integer, for packed sequences: tokens of different segments never see one another.
        softcap: Bounds the logits to ``softcap * tanh(logits / softcap)`` before mask and bias.
        is_causal: Whether later keys are hidden. A boolean ``attn_mask`` with a row for every query decides this
            alone, and so does an additive one that hides anything; one that hides nothing is a bias and does not.
        scale: Factor on the logits. ``None`` means ``D ** -0.5``.
        dropout_p: Dropout on the read-out matrix, never inside the walk.
        generator: Draws one seed for the dropout of this call. ``None``: torch's own generator of the CPU.
        impl: ``"auto"``: blocked where no token sees a later one, else a dense solve. ``"blocked"``: memory linear in
            ``T``, and a ``ValueError`` where it cannot be. ``"dense"``: holds the ``[B, H, T, T]`` matrix, can be
            differentiated twice and forward. ``"reference"``: the definition, for comparison; knows no softcap, no
            dropout and no ``U``.
        return_u: Also return the mixed values ``U``, with ``Y = A U``: what ``chain_decode_step`` continues from.
        tolerance: Where tokens see later ones: the largest backward error of the solve that counts as solved, that
            is ``|b - M x| / (|M| |x| + |b|)`` in the maximum norm. ``None``: 1e-6, or 1e-12 in float64. The error of
            the output can be larger by up to ``2 / (1 - gamma)``.
        on_inexact: What to do about a larger one: ``"raise"`` an ``InexactSolveError`` or ``"warn"`` with an
            ``InexactSolveWarning``.

    Returns:
        ``[B, H, T, E]`` in the dtype of ``value``, and ``U`` in the same shape and dtype if asked for. Computed in
        float32, in float64 for float64 inputs, under autocast as well. ``gamma = 0`` is ordinary attention. Time
        O(B H T^2 (D + E)), with a window O(B H T window (D + E)); memory O(B H T (D + E)). Where tokens see later
        ones, O(B H T^2 (T + E)) and O(T^2).

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If a value or shape does not fit.
        UnsupportedCacheError: If there are more or fewer keys than queries: cached plain values cannot be continued,
            but ``chain_decode_step`` continues from cached ``U``. A ``ValueError`` too.
        InexactSolveError: See ``on_inexact``.
        NotImplementedError: At a second or a forward-mode derivative, unless ``impl`` is ``"dense"`` or
            ``"reference"``.

    Example:
        >>> import torch
        >>> from hf_chainattn import chain_attention
        >>> query, key, value = torch.randn(3, 1, 2, 5, 8).unbind(0)
        >>> chain_attention(query, key, value, gamma=0.9).shape
        torch.Size([1, 2, 5, 8])
    """
    check_shapes(query, key, value)
    _check_settings(diagonal, impl, on_inexact)
    _check_numbers(softcap, scale, dropout_p)
    if impl == "reference" and (softcap is not None or dropout_p > 0 or return_u):
        raise ValueError("impl='reference' knows neither softcap, dropout nor U: use impl='dense' with them.")
    batch, heads, tokens, _ = query.shape
    check_masks(attn_mask, key_padding_mask, segment_ids, window, batch=batch, heads=heads, tokens=tokens)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    hop, halting = gamma_and_halting(gamma, query, key, value)
    if value.numel() == 0 or query.numel() == 0:
        # no batch row or no token: nothing to attend to, but still a part of the graph
        output = value.new_zeros(*query.shape[:3], value.shape[3]) + 0 * (query.sum() + key.sum() + value.sum())
        return (output, output.clone()) if return_u else output
    kept, masks, logits = diagonal == "kept", (attn_mask, key_padding_mask, segment_ids, window), (scale, softcap)
    if impl in ("auto", "blocked"):
        _refuse_forward_mode(query, key, value, hop, attn_mask)
        output, mixed, _, log_sum, _ = differentiable(
            *(query, key, value, hop, halting, *masks, is_causal, kept, *logits),
            *(impl == "blocked", tolerance, on_inexact),
        )
        if dropout_p > 0:
            arguments = (query, key, mixed, log_sum, *masks, is_causal, *logits, dropout_p, draw_seed(generator))
            output = read_out_with_dropout(*arguments)
    else:
        mask = AttentionMask(*masks, is_causal=is_causal, tokens=tokens)
        groups = heads // key.shape[1]
        with without_autocast(query):
            query = query.to(hop.dtype)
            full_key, full_value = (part.to(hop.dtype).repeat_interleave(groups, 1) for part in (key, value))
            if impl == "reference":
                visible, bias = mask.whole(query)
                return chain_attention_reference(
                    query, full_key, full_value, gamma=hop, diagonal=diagonal, mask=visible, bias=bias, scale=scale
                ).to(value.dtype)
            output, mixed = dense_chain_attention(
                query,
                full_key,
                full_value,
                hop,
                halting,
                mask,
                scale,
                softcap,
                kept=kept,
                dropout_p=dropout_p,
                generator=generator,
            )
    output = output.to(value.dtype)
    return (output, mixed.to(value.dtype)) if return_u else output


def _check_settings(diagonal: str, impl: str, on_inexact: str) -> None:
    check_diagonal(diagonal)
    for name, given, choices in (("impl", impl, Implementation), ("on_inexact", on_inexact, OnInexact)):
        if given not in get_args(choices):
            raise ValueError(f"{name} must be one of {list(get_args(choices))}, got {given!r}.")


def _check_numbers(softcap: float | None, scale: float | None, dropout_p: float) -> None:
    for name, given in (("softcap", softcap), ("scale", scale), ("dropout_p", dropout_p)):
        optional = name != "dropout_p" and given is None
        if not optional and (isinstance(given, bool) or not isinstance(given, numbers.Real)):
            raise TypeError(f"{name} must be a number, got {given!r}.")
    if softcap is not None and not 0.0 < softcap < float("inf"):
        raise ValueError(f"softcap must be positive and finite, or None, got {softcap!r}.")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p!r}.")


def _refuse_forward_mode(*tensors: Tensor | None) -> None:
    """Raise if a derivative is being carried forward: the operator would drop it without a word."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise NotImplementedError("Blocked chain attention has no forward-mode derivative: use impl='dense' for it.")
