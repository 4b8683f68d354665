"""Checks of what callers hand over, shared by all public functions on tensors."""

import torch
from torch import Tensor

from hf_chainattn.config import check_gamma
from hf_chainattn.errors import UnsupportedCacheError


def check_shapes(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise unless query ``[B, H, T, D]``, key ``[B, H_kv, T, D]`` and value ``[B, H_kv, T, E]`` fit one another.

    Raises:
        TypeError: If one is not a floating point tensor.
        ValueError: If a shape does not fit.
        UnsupportedCacheError: If there are more or fewer keys than queries.
    """
    check_tensors(query=query, key=key, value=value)
    if query.shape[2] != key.shape[2]:
        raise UnsupportedCacheError(
            f"Chain attention needs the same tokens as queries and keys, got {query.shape[2]} queries and "
            f"{key.shape[2]} keys. A walk cannot go on from plain cached values: continue from cached U with "
            "chain_decode_step(query, key, value, past_key, past_u, ...), where key and value hold only new tokens, "
            "or run the whole sequence, in generation with use_cache=False or model.generation_config.use_cache = "
            "False. A layer that reduces its keys, as some vision models do, has no chain."
        )
    check_heads(query, key, value)


def check_tensors(**tensors: Tensor) -> None:
    """Raise unless every argument is a floating point tensor with four dimensions."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating point tensor, got {getattr(tensor, 'dtype', tensor)!r}.")
        if tensor.ndim != 4:
            raise ValueError(f"{name} must have the shape [B, H, T, D], got {list(tensor.shape)}.")


def check_heads(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise unless the sizes other than the number of queries agree."""
    if key.shape[:3] != value.shape[:3] or query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise ValueError(
            "query [B, H, T, D], key [B, H_kv, T, D] and value [B, H_kv, T, E] must agree, got "
            f"{list(query.shape)}, {list(key.shape)} and {list(value.shape)}."
        )
    if query.shape[3] == 0:
        raise ValueError("query and key must have a width of at least 1, got 0.")
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise ValueError(
            f"The number of query heads must be a multiple of the key heads, got {query.shape[1]} and {key.shape[1]}."
        )


def work_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype of the computation: float32, or float64 if one of the inputs is."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def gamma_and_halting(gamma: float | Tensor, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return gamma and ``1 - gamma`` of every head, ``[H]`` each, in the dtype of the computation.

    That is float32, or float64 if one of the inputs is. ``1 - gamma`` of a Python number is formed before rounding:
    at 0.999 that saves two digits in float32.

    Raises:
        TypeError: If gamma is neither a number nor a tensor.
        ValueError: If a number is outside ``[0, 1)``, or a tensor not floating point with 1 or ``H`` elements.
    """
    heads, dtype = query.shape[1], work_dtype(query, key, value)
    if not isinstance(gamma, Tensor):
        check_gamma(gamma)
        hop, halting = (torch.full((heads,), n, dtype=dtype, device=query.device) for n in (gamma, 1.0 - gamma))
        return hop, halting
    if gamma.numel() not in (1, heads) or not gamma.is_floating_point():
        raise ValueError(
            f"gamma as a tensor must be floating point with 1 or H = {heads} elements, "
            f"got {gamma.dtype} of shape {list(gamma.shape)}."
        )
    full = gamma.to(device=query.device, dtype=torch.promote_types(gamma.dtype, dtype)).reshape(-1).expand(heads)
    return full.to(dtype).contiguous(), (1 - full).to(dtype)
