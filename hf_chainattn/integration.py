"""The registration of chain attention with transformers, under the name ``"chain"``.

Four things are needed, and ``unregister`` undoes them: the attention function; the mask function, without which
transformers would drop the padding mask silently; a class attribute ``PreTrainedConfig.chain_attention``, without
which ``from_pretrained(..., chain_attention={...})`` is refused; and wrappers around five methods of
``PreTrainedModel``. ``__init__`` begins and ``post_init`` ends every construction, ``set_attn_implementation`` makes
every change: there a model that cannot run as a chain says so instead of ignoring it. ``save_pretrained`` writes the
name into the config, ``_initialize_weights`` begins gates that a checkpoint lacks, ``init_continuous_batching`` is
refused.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.generation.continuous_batching import ContinuousMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import logging

from hf_chainattn.api import chain_attention
from hf_chainattn.calls import call_of, note_attention
from hf_chainattn.config import ChainAttentionConfig
from hf_chainattn.dense import attention_weights
from hf_chainattn.errors import UnsupportedModelError
from hf_chainattn.gates import ChainGate, gate_of, set_gate
from hf_chainattn.generation import attend_with_cache
from hf_chainattn.models import (
    check_class,
    check_model,
    check_part,
    mark_places,
    name_in_config,
    parts_of,
    prepare_model,
    release_model,
    tag,
)
from hf_chainattn.parts import NAME, all_configs, decoder_key, hand_down, narrow, parts_asked, share, uses_chain

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

# the wrappers that stand in classes of transformers while registered, by class and method
_installed: dict[tuple[type, str], Any] = {}

logger = logging.get_logger(__name__)


def register() -> None:
    """Make ``attn_implementation="chain"`` known to transformers. Importing the package does it; idempotent.

    Raises:
        RuntimeError: If another library holds the name.
    """
    if is_registered():
        return
    if NAME in AttentionInterface._global_mapping or NAME in AttentionMaskInterface._global_mapping:
        raise RuntimeError(
            f"Another library has registered the attention implementation {NAME!r}: import one of them."
        )
    AttentionInterface.register(NAME, chain_attention_forward)
    AttentionMaskInterface.register(NAME, chain_mask)
    PreTrainedConfig.chain_attention = None
    for (owner, method), wrapper in _WRAPPERS.items():
        _installed[owner, method] = wrapper(getattr(owner, method))
        setattr(owner, method, _installed[owner, method])


def unregister() -> None:
    """Undo ``register``. Models that use chain attention fail at their next forward; disable them first."""
    if not is_registered():
        return
    del AttentionInterface._global_mapping[NAME]
    del AttentionMaskInterface._global_mapping[NAME]
    del PreTrainedConfig.chain_attention
    for (owner, method), ours in _installed.items():
        # where another library has wrapped ours in turn, ours stays, and does nothing while it is not registered
        if getattr(owner, method) is ours:
            setattr(owner, method, ours.__wrapped__)
    _installed.clear()


def is_registered() -> bool:
    """Return whether transformers knows this package's ``attn_implementation="chain"``."""
    return AttentionInterface._global_mapping.get(NAME) is chain_attention_forward


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
    # ordinary attention knows no U in a cache
    if call.crosses or (gamma == 0.0 and softcap is None and call.layer is None):
        return _ordinary(module, query, key, value, mask, dropout, scaling, softcap), attention
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
    options: dict[str, Any] = {
        "gamma": gamma,
        "diagonal": settings.diagonal,
        "scale": scaling,
        "softcap": softcap,
        "dropout_p": dropout,
    }
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


def _wrapping(replacement: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Turn ``replacement(original, model, ...)`` into a maker of wrappers that step aside while not registered."""

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def method(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  what the original returns
            if not is_registered():
                return original(model, *args, **kwargs)
            return replacement(original, model, *args, **kwargs)

        return method

    return wrap


@_wrapping
def _init(
    original: Callable[..., Any], model: PreTrainedModel, config: PreTrainedConfig, *args: Any, **kwargs: Any
) -> None:
    if isinstance(config, PreTrainedConfig):
        narrow(config)
        if uses_chain(config):
            check_class(type(model))
    original(model, config, *args, **kwargs)


@_wrapping
def _post_init(original: Callable[..., Any], model: PreTrainedModel) -> None:
    original(model)
    _settle(model, [model])


@_wrapping
def _set_attn_implementation(
    original: Callable[..., Any], model: PreTrainedModel, attn_implementation: str | dict[str, Any], **kwargs: Any
) -> None:
    key = decoder_key(model.config) if _asks_whole(attn_implementation) else None
    if key is not None:
        # of a model made of several, the text decoder alone
        hand_down(model.config, key)
        others = attn_implementation if isinstance(attn_implementation, dict) else {}
        attn_implementation = {key: NAME} | {name: value for name, value in others.items() if name != ""}
    if attn_implementation == NAME or key == "":
        check_model(model)
    if isinstance(attn_implementation, dict) and NAME in attn_implementation.values():
        known = {"", *model.config.sub_configs}
        if unknown := sorted(set(attn_implementation) - known):
            raise UnsupportedModelError(f"{type(model).__name__} has the parts {sorted(known)}, got {unknown}.")
    parts, gated = parts_of(model), [module for module in model.modules() if gate_of(module) is not None]
    configs = [inner for part in parts for inner in all_configs(part.config)]
    before = [config._attn_implementation for config in configs]
    try:
        original(model, attn_implementation, **kwargs)
        for config in parts_asked(model.config, attn_implementation):
            check_part(model, config)
        _settle(model, parts)
    except Exception:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation_internal = implementation
        for module in model.modules():
            if module not in gated:
                set_gate(module, None)
        _settle(model, parts)
        raise


def _asks_whole(attn_implementation: str | dict[str, Any]) -> bool:
    """Return whether the request is for a model as a whole."""
    return NAME in (
        attn_implementation,
        attn_implementation.get("") if isinstance(attn_implementation, dict) else None,
    )


@_wrapping
def _save_pretrained(original: Callable[..., Any], model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
    # here and not only at a change: a part may have been switched without the whole knowing
    name_in_config(model.config)
    original(model, *args, **kwargs)


@_wrapping
def _initialize_weights(original: Callable[..., Any], model: PreTrainedModel, module: nn.Module, *args: Any) -> None:
    # a base checkpoint has no gates; each model type knows only its own modules, and would leave them as they are
    if isinstance(module, ChainGate):
        module.reset_parameters()
        return
    original(model, module, *args)


@_wrapping
def _init_continuous_batching(original: Callable[..., Any], model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
    # it would switch to flash attention by itself where that is installed
    if any(uses_chain(part.config) for part in parts_of(model)):
        raise UnsupportedModelError(
            f"Continuous batching has attention and caches of its own, and {type(model).__name__} is a chain: use "
            "generate(), which takes batches too."
        )
    return original(model, *args, **kwargs)


_WRAPPERS: dict[tuple[type, str], Callable[..., Any]] = {
    (PreTrainedModel, "__init__"): _init,
    (PreTrainedModel, "post_init"): _post_init,
    (PreTrainedModel, "set_attn_implementation"): _set_attn_implementation,
    (PreTrainedModel, "save_pretrained"): _save_pretrained,
    (PreTrainedModel, "_initialize_weights"): _initialize_weights,
    (ContinuousMixin, "init_continuous_batching"): _init_continuous_batching,
}


def _settle(model: PreTrainedModel, parts: list[PreTrainedModel]) -> None:
    """Prepare the parts that use chain attention by now, release the others, and name what is used in the config."""
    share(model.config, [part.config for part in parts_of(model)])
    for part in parts:
        if uses_chain(part.config):
            prepare_model(part)
        else:
            release_model(part)
    mark_places(model)
    tag(model)
    for part in parts:
        part.config.__dict__.pop("attn_implementation", None)
    name_in_config(model.config)
