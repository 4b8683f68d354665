"""What a model does at its construction, at a change of its attention, and when it is saved, beside its own.

``__init__`` begins and ``post_init`` ends every construction, ``set_attn_implementation`` makes every change: there a
model that cannot run as a chain says so instead of ignoring it. ``_initialize_weights`` begins gates that a checkpoint
lacks. ``save_pretrained`` writes the name into the config and a section into the model card.
``init_continuous_batching`` is refused. Every function here takes the method of transformers that it stands in for
first; ``registration.py`` puts them there.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from hf_chainattn.adapters import stamp
from hf_chainattn.card import update_model_card
from hf_chainattn.errors import UnsupportedModelError
from hf_chainattn.gates import ChainGate, gate_of, set_gate
from hf_chainattn.models import (
    check_class,
    check_model,
    check_part,
    check_savable,
    check_undivided,
    mark_places,
    name_in_config,
    parts_of,
    prepare_model,
    release_model,
    tag,
)
from hf_chainattn.parts import NAME, all_configs, decoder_key, hand_down, narrow, parts_asked, share, uses_chain
from hf_chainattn.summary import layer_groups

logger = logging.get_logger(__name__)


def begin_construction(
    original: Callable[..., Any], model: PreTrainedModel, config: PreTrainedConfig, *args: Any, **kwargs: Any
) -> None:
    """Begin a construction: settle which part of a model made of several is meant."""
    if isinstance(config, PreTrainedConfig):
        narrow(config)
        if uses_chain(config):
            check_class(type(model))
    original(model, config, *args, **kwargs)


def end_construction(original: Callable[..., Any], model: PreTrainedModel) -> None:
    """End a construction: prepare what uses chain attention."""
    original(model)
    _settle(model, [model])


def change_implementation(
    original: Callable[..., Any], model: PreTrainedModel, attn_implementation: str | dict[str, Any], **kwargs: Any
) -> None:
    """Change the implementation, or raise and leave the model as it was."""
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


def save_with_name(
    original: Callable[..., Any],
    model: PreTrainedModel,
    save_directory: str | Path,
    is_main_process: bool = True,
    *args: Any,
    **kwargs: Any,
) -> None:
    """Write the name of the implementation into the config that is saved, and how to load it into the model card."""
    # here and not only at a change: a part may have been switched without the whole knowing
    name_in_config(model.config)
    check_savable(model)
    if model._hf_peft_config_loaded:
        # the adapter is saved, without the model
        stamp(model, model.peft_config, model.active_adapters())
    original(model, save_directory, is_main_process, *args, **kwargs)
    if model.should_save_on_this_rank(is_main_process):
        update_model_card(model, save_directory)


def begin_gate(original: Callable[..., Any], model: PreTrainedModel, module: nn.Module, *args: Any) -> None:
    """Begin a gate."""
    # a base checkpoint has no gates; each model type knows only its own modules, and would leave them as they are
    if isinstance(module, ChainGate):
        module.reset_parameters()
        return
    original(model, module, *args)


def begin_continuous_batching(original: Callable[..., Any], model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
    """Refuse it: it would switch to flash attention by itself where that is installed."""
    if any(uses_chain(part.config) for part in parts_of(model)):
        raise UnsupportedModelError(
            f"Continuous batching has attention and caches of its own, and {type(model).__name__} is a chain: use "
            "generate(), which takes batches too."
        )
    return original(model, *args, **kwargs)


def _settle(model: PreTrainedModel, parts: list[PreTrainedModel]) -> None:
    """Prepare the parts that use chain attention by now, release the others, and name what is used in the config."""
    inside = parts_of(model)
    share(model.config, [part.config for part in inside])
    if any(uses_chain(part.config) for part in inside):
        check_undivided(model)
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
    if any(uses_chain(part.config) for part in parts):
        layers = "; ".join(f"{group.gamma} in {group.name} ({group.layers})" for group in layer_groups(model))
        logger.info(f"{type(model).__name__} computes chain attention: {layers}.")
