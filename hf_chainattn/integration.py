"""The registration of chain attention with transformers, under the name ``"chain"``.

Four things are needed, and [`unregister`] undoes them: the attention function; the mask function, without which
transformers would drop the padding mask silently; a class attribute ``PreTrainedConfig.chain_attention``, without
which ``from_pretrained(..., chain_attention={...})`` is refused; and a wrapper around the two places where a model
takes its attention implementation, so that a model which cannot run as a chain says so instead of ignoring it.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from hf_chainattn.api import chain_attention
from hf_chainattn.config import ChainAttentionConfig
from hf_chainattn.errors import UnsupportedCacheError, UnsupportedModelError
from hf_chainattn.models import NAME, check_model, prepare_model, release_model, uses_chain

_originals: dict[str, Callable[..., Any]] = {}


def register() -> None:
    """Make ``attn_implementation="chain"`` known to transformers. Importing the package does it; idempotent."""
    if is_registered():
        return
    AttentionInterface.register(NAME, chain_attention_forward)
    AttentionMaskInterface.register(NAME, chain_mask)
    PreTrainedConfig.chain_attention = None
    _wrap("post_init", _post_init)
    _wrap("set_attn_implementation", _set_attn_implementation)


def unregister() -> None:
    """Undo [`register`]. Models that use chain attention raise at their next forward; reload or disable them first."""
    if not is_registered():
        return
    del AttentionInterface._global_mapping[NAME]
    del AttentionMaskInterface._global_mapping[NAME]
    del PreTrainedConfig.chain_attention
    for method in list(_originals):
        setattr(PreTrainedModel, method, _originals.pop(method))


def is_registered() -> bool:
    """Return whether transformers knows ``attn_implementation="chain"``."""
    return NAME in AttentionInterface._global_mapping


def chain_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cache: object = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls; see [`chain_attention`] for the operation.

    Args:
        module: The calling attention module; ``module.config.chain_attention`` holds the settings.
        query: ``[B, H, T, D]``.
        key: ``[B, H_kv, T, D]``.
        value: ``[B, H_kv, T, E]``.
        attention_mask: ``[B, 1 or H, T, T]``, boolean or additive, or ``None``.
        dropout: Chance, of the read-out only.
        scaling: Factor on the logits.
        is_causal: What ``attention_mask=None`` means; ``None`` asks ``module.is_causal``.
        position_bias: ``[1 or B, H, T, T]``, added to the logits.
        softcap: Bound on the logits.
        s_aux: Attention sinks; refused.
        cache: Paged cache of continuous batching; refused.

    Returns:
        ``[B, T, H, E]``, and ``None`` for the attention weights.

    Raises:
        UnsupportedCacheError: If keys or values come out of a cache.
        UnsupportedModelError: If the model was not prepared, or uses attention sinks.
    """
    stored = getattr(getattr(module, "config", None), "chain_attention", None)
    if stored is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} has no chain_attention settings in its config: switch the model that holds it "
            "with hf_chainattn.enable_chain_attention(model)."
        )
    settings = ChainAttentionConfig.from_value(stored)
    if cache is not None:
        raise UnsupportedCacheError(
            "Chain attention cannot run in continuous batching, whose cache holds plain values: use generate()."
        )
    if s_aux is not None:
        raise UnsupportedModelError(
            f"{type(module).__name__} uses attention sinks, which chain attention does not know: use sdpa or eager."
        )
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    mask = attention_mask if position_bias is None else _biased_mask(attention_mask, position_bias, causal=causal)
    output = chain_attention(
        query,
        key,
        value,
        gamma=settings.gamma,
        diagonal=settings.diagonal,
        attn_mask=mask,
        is_causal=causal,
        scale=scaling,
        softcap=softcap,
        dropout_p=dropout,
    )
    return output.transpose(1, 2).contiguous(), None


def chain_mask(
    *args: Any, q_length: int, kv_length: int, allow_is_causal_skip: bool = True, **kwargs: Any
) -> Tensor | None:
    """The mask function that transformers calls: the boolean mask of sdpa, ``[B, 1, T, T]``, or ``None``.

    ``None`` stands for "exactly causal" only where queries and keys are the same tokens. With a cache, sdpa's own
    shortcut would leave the mask to its kernel's alignment rules.
    """
    return sdpa_mask(
        *args,
        q_length=q_length,
        kv_length=kv_length,
        allow_is_causal_skip=allow_is_causal_skip and q_length == kv_length,
        **kwargs,
    )


def _biased_mask(attention_mask: Tensor | None, position_bias: Tensor, *, causal: bool) -> Tensor:
    """Return an additive mask ``[B or 1, H, T, T]`` that holds both the bias and who is seen."""
    if attention_mask is None:
        if not causal:
            return position_bias
        attention_mask = torch.ones(position_bias.shape[-2:], dtype=torch.bool, device=position_bias.device).tril()
    if attention_mask.dtype == torch.bool:
        return torch.where(attention_mask, position_bias, -torch.inf)
    return position_bias + attention_mask


def _wrap(method: str, replacement: Callable[..., Any]) -> None:
    _originals[method] = original = getattr(PreTrainedModel, method)
    setattr(PreTrainedModel, method, functools.wraps(original)(replacement))


def _post_init(model: PreTrainedModel) -> None:
    _originals["post_init"](model)
    if uses_chain(model.config):
        prepare_model(model)


def _set_attn_implementation(model: PreTrainedModel, attn_implementation: str | dict[str, Any], **kwargs: Any) -> None:
    if attn_implementation == NAME:
        # transformers only logs where a model type cannot switch; asked for by name, that is an error
        check_model(model)
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    before = [part.config._attn_implementation for part in parts]
    try:
        _originals["set_attn_implementation"](model, attn_implementation, **kwargs)
        _settle(parts)
    except Exception:
        for part, implementation in zip(parts, before, strict=True):
            part.config._attn_implementation_internal = implementation
        _settle(parts)
        raise


def _settle(parts: list[PreTrainedModel]) -> None:
    """Prepare the models that use chain attention by now, and release the others."""
    for part in parts:
        if uses_chain(part.config):
            prepare_model(part)
        else:
            release_model(part)
