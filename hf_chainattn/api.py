"""The public function: checks its arguments, chooses an implementation, and lets it compute."""

from typing import Literal, get_args

import torch
from torch import Tensor

from hf_chainattn.config import check_diagonal, check_gamma
from hf_chainattn.dense import dense_chain_attention
from hf_chainattn.errors import UnsupportedCacheError
from hf_chainattn.masks import read_mask
from hf_chainattn.reference import chain_attention_reference

Implementation = Literal["auto", "dense", "reference"]


def chain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    gamma: float | Tensor,
    diagonal: str = "kept",
    attn_mask: Tensor | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    impl: Implementation = "auto",
) -> Tensor:
    r"""Chain attention, ``Y = (1 - gamma) A (I - gamma A_c)^-1 V`` with ``A`` the softmax attention of each head.

    A drop-in for ``torch.nn.functional.scaled_dot_product_attention`` where queries and keys are the same tokens. One
    call follows references of any depth: hop ``k`` enters with weight ``(1 - gamma) gamma^(k-1)``.

    Letters: ``B`` batch, ``H`` query heads, ``H_kv`` key heads (a divisor of ``H``), ``T`` tokens, ``D`` key width,
    ``E`` value width.

    Args:
        query: ``[B, H, T, D]``.
        key: ``[B, H_kv, T, D]``.
        value: ``[B, H_kv, T, E]``.
        gamma: Chance of one more hop, in ``[0, 1)``: a number, or a tensor of shape ``[H]`` or ``[1]``, which may
            require gradients. Tensor values are not checked, so that no device is waited for.
        diagonal: ``"kept"``: ``A_c = A``; ``"removed"``: ``A_c`` is ``A`` with a zero diagonal.
        attn_mask: Boolean (True = visible) or additive, broadcastable to ``[B, H, T, T]``. A row that sees nothing
            gives 0. If given, it alone says who is seen; a mask that lets a token see a later one costs a dense solve.
        is_causal: Without ``attn_mask``: the causal mask (default) or none.
        scale: Factor on the logits. ``None`` means ``D ** -0.5``.
        softcap: Bounds the logits to ``softcap * tanh(logits / softcap)``.
        dropout_p: Dropout on the read-out matrix, never inside the walk. Uses torch's global generator.
        impl: ``"dense"`` holds the ``[B, H, T, T]`` matrix; ``"reference"`` is the definition, for comparison (it
            knows no softcap and no dropout); ``"auto"`` is ``"dense"``.

    Returns:
        ``[B, H, T, E]`` in the dtype of ``value``. Computed in float32, in float64 for float64 inputs, under autocast
        as well. ``gamma = 0`` is ordinary attention.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If a value or shape does not fit.
        UnsupportedCacheError: If there are more or fewer keys than queries: cached plain values cannot be continued.

    Example:
        >>> import torch
        >>> from hf_chainattn import chain_attention
        >>> query, key, value = torch.randn(3, 1, 2, 5, 8).unbind(0)
        >>> chain_attention(query, key, value, gamma=0.9).shape
        torch.Size([1, 2, 5, 8])
    """
    _check_shapes(query, key, value)
    check_diagonal(diagonal)
    if impl not in get_args(Implementation):
        raise ValueError(f"impl must be one of {list(get_args(Implementation))}, got {impl!r}.")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p!r}.")
    if impl == "reference" and (softcap is not None or dropout_p > 0):
        raise ValueError("impl='reference' knows neither softcap nor dropout: use impl='dense' with them.")
    dtype = torch.promote_types(value.dtype, torch.float32)
    # casting alone would not do: an outer autocast would take the products back to half precision
    with torch.autocast(query.device.type, enabled=False):
        gammas = _gamma_tensor(gamma, heads=query.shape[1], dtype=dtype, device=query.device)
        mask = read_mask(attn_mask, tokens=query.shape[2], is_causal=is_causal, device=query.device)
        groups = query.shape[1] // key.shape[1]
        full_key = key.to(dtype).repeat_interleave(groups, dim=1)
        full_value = value.to(dtype).repeat_interleave(groups, dim=1)
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        if impl == "reference":
            everything = torch.ones((), dtype=torch.bool, device=query.device)
            visible = everything if mask.visible is None else mask.visible
            result = chain_attention_reference(
                query.to(dtype),
                full_key,
                full_value,
                gamma=gammas,
                diagonal=diagonal,
                mask=visible,
                bias=mask.bias,
                scale=factor,
            )
        else:
            result = dense_chain_attention(
                query.to(dtype),
                full_key,
                full_value,
                gamma=gammas,
                diagonal=diagonal,
                mask=mask,
                scale=factor,
                softcap=softcap,
                dropout_p=dropout_p,
            )
    return result.to(value.dtype)


def _gamma_tensor(gamma: float | Tensor, *, heads: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if not isinstance(gamma, Tensor):
        check_gamma(gamma)
        return torch.tensor([gamma], dtype=dtype, device=device)
    if gamma.numel() not in (1, heads) or not gamma.is_floating_point():
        raise ValueError(
            f"gamma as a tensor must be floating point with 1 or H = {heads} elements, "
            f"got {gamma.dtype} of shape {list(gamma.shape)}."
        )
    return gamma.to(device=device, dtype=dtype).reshape(-1)


def _check_shapes(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating point tensor, got {getattr(tensor, 'dtype', tensor)!r}.")
        if tensor.ndim != 4:
            raise ValueError(f"{name} must have the shape [B, H, T, D], got {list(tensor.shape)}.")
    if query.shape[2] != key.shape[2]:
        raise UnsupportedCacheError(
            f"Chain attention needs the same tokens as queries and keys, got {query.shape[2]} queries and "
            f"{key.shape[2]} keys. Values from an ordinary cache cannot be continued: run the whole sequence, in "
            "generation with use_cache=False or model.generation_config.use_cache = False. A layer that reduces its "
            "keys, as some vision models do, has no chain."
        )
    if key.shape[:3] != value.shape[:3] or query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise ValueError(
            "query [B, H, T, D], key [B, H_kv, T, D] and value [B, H_kv, T, E] must agree, got "
            f"{list(query.shape)}, {list(key.shape)} and {list(value.shape)}."
        )
    if query.shape[1] % key.shape[1]:
        raise ValueError(
            f"The number of query heads must be a multiple of the key heads, got {query.shape[1]} and {key.shape[1]}."
        )
