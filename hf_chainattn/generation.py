"""Chain attention of a module that has a cache: a prompt at once, and what follows from keys and ``U``."""

from typing import Any

from torch import Tensor

from hf_chainattn.api import chain_attention
from hf_chainattn.cache import ChainLayer
from hf_chainattn.decode import decode_from_memory


def attend_with_cache(
    layer: ChainLayer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    *,
    made_with: object,
    dropout_p: float,
    **settings: Any,
) -> Tensor:
    """Return chain attention ``[B, H, C, E]`` of new tokens to all that the cache holds, and commit their ``U`` to it.

    Args:
        layer: Of the cache; it has been updated with the new tokens.
        query: ``[B, H, C, D]``, of the new tokens.
        key: ``[B, H_kv, K, D]``, as ``layer.update`` returned it.
        value: ``[B, H_kv or H, K, E]``, likewise.
        mask: Boolean or additive, broadcastable to ``[B, H, C, K]``.
        made_with: What the ``U`` of the cache depends on and must not change: diagonal, and gamma where it is fixed.
        dropout_p: Dropout of the read-out.
        settings: ``gamma``, ``diagonal``, ``scale`` and ``softcap`` as for ``chain_attention``.

    Raises:
        UnsupportedModelError: If the module does not attend to what its layer of the cache returned.
        UnsupportedCacheError: If the cache was filled with other settings.
    """
    heads, count = query.shape[1:3]
    layer.check(key, value, made_with)
    layer.widen(heads // layer.keys.shape[1])
    if layer.empty:
        new_key, new_value = key[:, :, :count], value[:, :, :count]
        # a cache that has been used repeats values for the heads that share them
        new_value = new_value[:, :: new_value.shape[1] // new_key.shape[1]]
        mask = mask if mask.shape[-1] == 1 else mask[..., :count]
        output, u = chain_attention(
            query,
            new_key,
            new_value,
            attn_mask=mask,
            is_causal=False,
            dropout_p=dropout_p,
            return_u=True,
            **settings,
        )
    else:
        values = value if value.shape[1] == heads else value.repeat_interleave(heads // value.shape[1], 1)
        places = layer.places()
        output, u = decode_from_memory(query, key, values, places, attn_mask=mask, dropout_p=dropout_p, **settings)
    layer.commit(u.to(layer.values.dtype))
    return output
