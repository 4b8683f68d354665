"""What transformers calls under the name ``"chain"``: the attention function, and the function that makes its mask.

Without the second, transformers would drop the padding mask silently. ``registration.py`` makes both known.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hf_chainattn.api import chain_attention
from hf_chainattn.calls import call_of, note_attention, show
from hf_chainattn.config import ChainAttentionConfig
from hf_chainattn.dense import attention_weights
from hf_chainattn.errors import UnsupportedModelError
from hf_chainattn.gates import gate_of
from hf_chainattn.generation import attend_with_cache
from hf_chainattn.models import divided

# what models hand on that does not change attention, or that the mask already holds
_HARMLESS = frozenset(
    {
        "cache_position",
        "deterministic",
        "logits_to_keep",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
        "sliding_window",
        "use_cache",
    }
)


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
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function that transformers calls; see ``chain_attention`` for the operation.

    Args:
        module: The calling attention module; ``module.config.chain_attention`` holds the settings.
        query: ``[B, H, T, D]``.
        key: ``[B, H_kv, T, D]``.
        value: ``[B, H_kv, T, E]``.
        attention_mask: ``[B, 1 or H, T, S]``, boolean or additive; ``None`` means that every token sees every token,
            as it does in every model's own eager attention. ``chain_mask`` never leaves a causal mask out. ``S`` is
            ``T`` but for cross-attention and with a cache.
        dropout: Chance, of the read-out only.
        scaling: Factor on the logits.
        is_causal: Not used: the mask decides. Kernels without a mask need it.
        position_bias: ``[1 or B, H, T, T]``, added to the logits.
        softcap: Bound on the logits.
        others: Whatever else is handed on; refused unless it is known not to matter.

    Returns:
        ``[B, T, H, E]``, and with ``output_attentions`` ordinary attention ``A``, ``[B, H, T, S]``, of which the
        chain is made; else ``None``.

    Raises:
        UnsupportedCacheError: If there are other keys than queries and no cache, or one that cannot be continued.
        UnsupportedModelError: If the model was not prepared, does not attend to what it cached, or hands on something
            that changes attention, such as attention sinks, indices of a sparse pattern, packing by sequence lengths,
            or a paged cache.
    """
    stored, call = getattr(getattr(module, "config", None), "chain_attention", None), call_of(module)
    if stored is None or call is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} belongs to a model that was not prepared for chain attention: switch the model "
            "with hf_chainattn.enable_chain_attention(model)."
        )
    if strange := sorted(name for name, value in others.items() if value is not None and name not in _HARMLESS):
        raise UnsupportedModelError(
            f"{type(module).__name__} hands {strange} to its attention, which chain attention does not know and may "
            "not ignore: use attn_implementation='eager' for this model, or call it without them."
        )
    note_attention(module)
    mask, settings = _with_bias(attention_mask, position_bias), ChainAttentionConfig.from_value(stored)
    attention = None
    if others.get("output_attentions"):
        attention = attention_weights(query, key, mask, scale=scaling, softcap=softcap)
    gamma: float | tuple[float, ...] | Tensor = settings.of_layer(call.place.number, in_encoder=call.place.in_encoder)
    shown = {"diagonal": settings.diagonal, "scale": scaling, "softcap": softcap}
    # ordinary attention knows no U in a cache
    if call.crosses or (gamma == 0.0 and softcap is None and call.layer is None):
        if not call.crosses:
            show(module, query, key, mask, gamma=0.0, **shown)
        return _ordinary(module, query, key, value, mask, dropout, scaling, softcap), attention
    if call.place.heads not in (None, query.shape[1]):
        raise divided(type(module).__name__, f"processes, with {query.shape[1]} of {call.place.heads} heads here,")
    gate = gate_of(module)
    if settings.learnable != (gate is not None) and gamma != 0.0:
        raise UnsupportedModelError(
            f"{type(module).__name__} {'has no gate' if settings.learnable else 'still has a gate'}, and "
            f"config.chain_attention says learnable={settings.learnable}: change that with enable_chain_attention."
        )
    made_with = settings.diagonal, "a learned gamma" if gate is not None else gamma
    if gate is not None:
        gamma = gate()
    elif isinstance(gamma, tuple):
        gamma = torch.tensor(gamma, dtype=torch.float64)
    show(module, query, key, mask, gamma=gamma, **shown)
    options: dict[str, Any] = {"gamma": gamma, "dropout_p": dropout, **shown}
    if call.layer is None:
        output = chain_attention(query, key, value, attn_mask=mask, is_causal=False, **options)
    else:
        if mask is None:
            mask = query.new_ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool)
        output = attend_with_cache(call.layer, query, key, value, mask, made_with=made_with, **options)
    return output.transpose(1, 2).contiguous(), attention


def chain_mask(
    *args: Any, allow_is_causal_skip: bool = True, allow_is_bidirectional_skip: bool = False, **kwargs: Any
) -> Tensor:
    """The mask function that transformers calls: the boolean mask of sdpa, ``[B, 1, T, T]``, always written out.

    sdpa may leave out a causal or a full mask and lets its kernel guess which of the two ``None`` was from a flag of
    the attention module. That flag is wrong in some models, where the guess would show the future to a decoder.
    Without padding the mask is one ``[T, T]`` shared by the batch.
    """
    mask: Tensor = sdpa_mask(*args, allow_is_causal_skip=False, allow_is_bidirectional_skip=False, **kwargs)
    return mask


def _ordinary(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    """Return ordinary attention ``[B, T, H, E]``: that of sdpa, or written out where there is a softcap."""
    if softcap is not None:
        weights = attention_weights(query, key, mask, scale=scaling, softcap=softcap)
        values = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
        return (nn.functional.dropout(weights, dropout) @ values).transpose(1, 2).contiguous()
    if mask is not None and mask.is_floating_point():
        # the kernel of torch 2.13 for CPUs reads a float32 mask as if it were float64 where the queries are
        mask = mask.to(torch.promote_types(mask.dtype, query.dtype))
    output, _ = sdpa_attention_forward(
        module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=False
    )
    return output


def _with_bias(attention_mask: Tensor | None, position_bias: Tensor | None) -> Tensor | None:
    """Return one mask ``[1 or B, 1 or H, T, T]`` that holds both who is seen and what is added."""
    if position_bias is None or attention_mask is None:
        return attention_mask if position_bias is None else position_bias
    if attention_mask.dtype == torch.bool:
        return torch.where(attention_mask, position_bias, -torch.inf)
    return position_bias + attention_mask
