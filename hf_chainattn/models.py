"""Which transformers models can run with chain attention, and making one ready for it or ordinary again."""

import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from hf_chainattn.config import ChainAttentionConfig, Diagonal
from hf_chainattn.errors import UnsupportedModelError

NAME = "chain"

# a value under one of these names means that keys or values come from other tokens than the queries
_FOREIGN_KEYS = (
    "key_value_states",
    "encoder_hidden_states",
    "cross_attention_states",
    "key_hidden_states",
    "value_hidden_states",
    "value_embeds",
    "context",
    "context_hidden_states",
    "shared_kv_states",
)

logger = logging.get_logger(__name__)


def enable_chain_attention(
    model: PreTrainedModel, *, gamma: float = 0.9, diagonal: Diagonal = "kept"
) -> PreTrainedModel:
    """Switch a model that is already in memory to chain attention, in place, and return it.

    The same as ``from_pretrained(..., attn_implementation="chain")`` with ``config.chain_attention`` set. Settings are
    written to ``model.config``, so that ``save_pretrained`` keeps them.

    Args:
        model: Any transformers model whose self-attention goes through the attention interface.
        gamma: Chance of one more hop, in ``[0, 1)``. With 0 the outputs are those of ordinary attention.
        diagonal: ``"kept"`` or ``"removed"``, see [`ChainAttentionConfig`].

    Raises:
        UnsupportedModelError: If the model cannot run with it. The model is then as it was.
        ValueError: If a setting is out of range.

    Example:
        >>> from transformers import AutoModelForCausalLM, GPT2Config
        >>> from hf_chainattn import enable_chain_attention
        >>> config = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11, bos_token_id=1, eos_token_id=2)
        >>> model = enable_chain_attention(AutoModelForCausalLM.from_config(config), gamma=0.9)
        >>> model.config._attn_implementation
        'chain'
    """
    settings = ChainAttentionConfig(gamma=gamma, diagonal=diagonal)
    check_model(model)
    before = model.config.chain_attention
    model.config.chain_attention = settings.to_dict()
    try:
        model.set_attn_implementation(NAME)
    except Exception:
        model.config.chain_attention = before
        raise
    return model


def disable_chain_attention(model: PreTrainedModel, *, attn_implementation: str = "sdpa") -> PreTrainedModel:
    """Return the model to an ordinary attention implementation, in place, and return it.

    Hooks and config entries of this package are gone afterwards; weights were never touched.

    Args:
        model: A model with chain attention; on any other it only sets the implementation.
        attn_implementation: What to use instead.
    """
    model.set_attn_implementation(attn_implementation)
    return model


def uses_chain(config: PreTrainedConfig) -> bool:
    """Return whether a model with this config dispatches to chain attention."""
    return bool(config._attn_implementation == NAME)


def dispatching_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield name and module of every part of ``model`` whose own forward calls the attention interface."""
    for name, module in model.named_modules():
        code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
        if code is not None and {"ALL_ATTENTION_FUNCTIONS", "get_interface"} <= set(code.co_names):
            yield name, module


def check_model(model: PreTrainedModel) -> None:
    """Raise unless every attention of ``model`` that would run as a chain is self-attention that really dispatches.

    Raises:
        UnsupportedModelError: For a model with several sub-models, with cross-attention, or whose attention never
            looks at the attention interface.
    """
    config, kind = model.config, type(model).__name__
    if config.sub_configs:
        parts = sorted(config.sub_configs)
        raise UnsupportedModelError(
            f"{kind} is made of several models ({', '.join(parts)}), and chain attention must be asked for by part: "
            f"pass a dict such as attn_implementation={{'{parts[-1]}': 'chain'}}."
        )
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        raise UnsupportedModelError(
            f"{kind} has cross-attention, where queries and keys are different tokens and no chain exists. Chain "
            "attention runs encoder-only and decoder-only models: use attn_implementation='sdpa' here."
        )
    found = list(dispatching_modules(model))
    if not found:
        raise UnsupportedModelError(
            f"{kind} accepts attn_implementation='chain' but never calls the attention interface, so that the setting "
            "would silently change nothing. Use a model type whose attention dispatches (GPT-2, Llama, BERT, ViT and "
            "most others), or attn_implementation='eager' here."
        )
    for name, module in found:
        names = [parameter for parameter in inspect.signature(type(module).forward).parameters if parameter != "self"]
        if names[:1] != ["hidden_states"]:
            raise UnsupportedModelError(
                f"{kind} has an attention module {name} whose queries and keys may be different tokens (it takes "
                f"{names[:3]}), and no chain exists across them: use attn_implementation='sdpa' here."
            )


def prepare_model(model: PreTrainedModel) -> None:
    """Check a model that asks for chain attention, guard its attention modules, and complete its config.

    Runs at the end of every model construction and after every change of the attention implementation. Idempotent.

    Raises:
        UnsupportedModelError: See [`check_model`].
        ValueError: If ``config.chain_attention`` holds a bad value.
    """
    settings = ChainAttentionConfig.from_value(model.config.chain_attention)
    check_model(model)
    if model.config.chain_attention is None:
        logger.warning_once(
            f"{type(model).__name__} has no `chain_attention` entry in its config: gamma={settings.gamma}, "
            f"diagonal='{settings.diagonal}'. Weights that were trained with ordinary attention have not learned to "
            "use it; set config.chain_attention = {'gamma': 0.0} for ordinary outputs."
        )
    model.config.chain_attention = settings.to_dict()
    # transformers does not save the attention implementation; as a plain attribute it reaches config.json, and a
    # reload then uses chain attention, or fails by name where this package was not imported
    model.config.attn_implementation = NAME
    for _, module in dispatching_modules(model):
        if _refuse_foreign_keys not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_refuse_foreign_keys, with_kwargs=True)


def release_model(model: PreTrainedModel) -> None:
    """Take back what [`prepare_model`] left on a model. Idempotent."""
    for attribute in ("chain_attention", "attn_implementation"):
        model.config.__dict__.pop(attribute, None)
    for _, module in dispatching_modules(model):
        # by identity and not by a kept handle: a deep copy of the model has the hook, but no handle to it
        for number in [n for n, hook in module._forward_pre_hooks.items() if hook is _refuse_foreign_keys]:
            del module._forward_pre_hooks[number]
            module._forward_pre_hooks_with_kwargs.pop(number, None)


def _refuse_foreign_keys(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook: the attention function cannot see where its keys come from, the module's arguments tell."""
    given = inspect.signature(type(module).forward).bind_partial(module, *args, **kwargs).arguments
    given |= given.get("kwargs", {})
    for name in _FOREIGN_KEYS:
        if given.get(name) is not None:
            raise UnsupportedModelError(
                f"{type(module).__name__} was called with {name}: its keys are not its queries' tokens, and no chain "
                "exists across them. Use attn_implementation='sdpa' for a model with cross-attention or shared keys."
            )
