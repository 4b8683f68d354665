"""The registration of chain attention with transformers, under the name ``"chain"``.

Four things are needed, and ``unregister`` undoes them: the attention function; the mask function, without which
transformers would drop the padding mask silently; a class attribute ``PreTrainedConfig.chain_attention``, without
which ``from_pretrained(..., chain_attention={...})`` is refused; and wrappers around five methods of
``PreTrainedModel``. ``__init__`` begins and ``post_init`` ends every construction, ``set_attn_implementation`` makes
every change: there a model that cannot run as a chain says so instead of ignoring it. ``save_pretrained`` writes the
name into the config, ``_initialize_weights`` begins gates that a checkpoint lacks.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import logging

from hf_chainattn.api import chain_attention
from hf_chainattn.calls import call_of, show
from hf_chainattn.config import ChainAttentionConfig
from hf_chainattn.dense import attention_weights
from hf_chainattn.errors import UnsupportedModelError
from hf_chainattn.gates import ChainGate, gate_of, set_gate
from hf_chainattn.generation import attend_with_cache
from hf_chainattn.models import (
    check_model,
    mark_places,
    name_in_config,
    never_dispatches,
    parts_of,
    prepare_model,
    release_model,
    tag,
)
from hf_chainattn.parts import NAME, decoder_key, hand_down, narrow, share, uses_chain

# what models hand on that does not change attention, or that the mask already holds
_HARMLESS = frozenset(
    {
        "cache_position",
        "deterministic",
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

# the wrappers that stand in PreTrainedModel while registered
_installed: dict[str, Any] = {}

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
    for method, wrapper in _WRAPPERS.items():
        _installed[method] = wrapper(getattr(PreTrainedModel, method))
        setattr(PreTrainedModel, method, _installed[method])


def unregister() -> None:
    """Undo ``register``. Models that use chain attention fail at their next forward; disable them first."""
    if not is_registered():
        return
    del AttentionInterface._global_mapping[NAME]
    del AttentionMaskInterface._global_mapping[NAME]
    del PreTrainedConfig.chain_attention
    for method, ours in _installed.items():
        # where another library has wrapped ours in turn, ours stays, and does nothing while it is not registered
        if getattr(PreTrainedModel, method) is ours:
            setattr(PreTrainedModel, method, ours.__wrapped__)
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
    mask, settings = _with_bias(attention_mask, position_bias), ChainAttentionConfig.from_value(stored)
    attention = None
    if others.get("output_attentions"):
        attention = attention_weights(query, key, mask, scale=scaling, softcap=softcap)
    gamma: float | tuple[float, ...] | Tensor = settings.of_layer(call.place.number, in_encoder=call.place.in_encoder)
    shown = {"diagonal": settings.diagonal, "scale": scaling, "softcap": softcap}
    # what is ordinary is left to sdpa, which has no softcap and knows no U in a cache
    if call.crosses or (gamma == 0.0 and softcap is None and call.layer is None):
        if softcap is not None:
            raise UnsupportedModelError(f"{type(module).__name__} softcaps cross-attention, which sdpa cannot do.")
        if not call.crosses:
            show(module, query, key, mask, gamma=0.0, **shown)
        output, _ = sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=False
        )
        return output, attention
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
    # before the modules are built: some look the name up in a table of their own, and would end in a bare KeyError
    asked = isinstance(config, PreTrainedConfig) and uses_chain(config)
    if asked and not type(model)._can_set_attn_implementation():
        raise never_dispatches(type(model).__name__)
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
    if attn_implementation == NAME:
        # transformers only logs where a model type cannot switch; asked for by name, that is an error
        check_model(model)
    elif isinstance(attn_implementation, dict) and NAME in attn_implementation.values():
        known = {"", *model.config.sub_configs}
        if unknown := sorted(set(attn_implementation) - known):
            raise UnsupportedModelError(f"{type(model).__name__} has the parts {sorted(known)}, got {unknown}.")
    parts, gated = parts_of(model), [module for module in model.modules() if gate_of(module) is not None]
    before = [part.config._attn_implementation for part in parts]
    try:
        original(model, attn_implementation, **kwargs)
        _settle(model, parts)
    except Exception:
        for part, implementation in zip(parts, before, strict=True):
            part.config._attn_implementation_internal = implementation
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


_WRAPPERS = {
    "__init__": _init,
    "post_init": _post_init,
    "set_attn_implementation": _set_attn_implementation,
    "save_pretrained": _save_pretrained,
    "_initialize_weights": _initialize_weights,
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
