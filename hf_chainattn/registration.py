"""The registration of chain attention with transformers, under the name ``"chain"``.

Four things are needed, and ``unregister`` undoes them: the attention function; the mask function; a class attribute
``PreTrainedConfig.chain_attention``, without which ``from_pretrained(..., chain_attention={...})`` is refused; and
wrappers around methods of transformers, listed below, which step aside while the name is not registered.
"""

import functools
from collections.abc import Callable
from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.modelcard import TrainingSummary

from hf_chainattn.card import complete_upload, describe_training, write_training
from hf_chainattn.integration import chain_attention_forward, chain_mask
from hf_chainattn.lifecycle import (
    begin_construction,
    begin_gate,
    change_implementation,
    end_construction,
    save_with_name,
)
from hf_chainattn.parts import NAME

# class, method, and what is called instead, with the method as its first argument
_WRAPPERS: tuple[tuple[type, str, Callable[..., Any]], ...] = (
    (PreTrainedModel, "__init__", begin_construction),
    (PreTrainedModel, "post_init", end_construction),
    (PreTrainedModel, "set_attn_implementation", change_implementation),
    (PreTrainedModel, "save_pretrained", save_with_name),
    (PreTrainedModel, "_initialize_weights", begin_gate),
    (PreTrainedModel, "_upload_modified_files", complete_upload),
    # Trainer writes a model card of its own when it publishes
    (TrainingSummary, "from_trainer", describe_training),
    (TrainingSummary, "to_model_card", write_training),
)

# while registered: class, method, our wrapper, and what the class had itself
_installed: list[tuple[type, str, Any, Any]] = []


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
    for owner, name, replacement in _WRAPPERS:
        own = owner.__dict__.get(name)
        if isinstance(own, classmethod):
            wrapper: Any = classmethod(_wrapped(own.__func__, replacement))
        else:
            wrapper = _wrapped(getattr(owner, name), replacement)
        setattr(owner, name, wrapper)
        _installed.append((owner, name, wrapper, own))


def unregister() -> None:
    """Undo ``register``. Models that use chain attention fail at their next forward; disable them first."""
    if not is_registered():
        return
    del AttentionInterface._global_mapping[NAME]
    del AttentionMaskInterface._global_mapping[NAME]
    del PreTrainedConfig.chain_attention
    for owner, name, wrapper, own in _installed:
        # where another library has wrapped ours in turn, ours stays, and does nothing while it is not registered
        if owner.__dict__.get(name) is not wrapper:
            continue
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)
    _installed.clear()


def is_registered() -> bool:
    """Return whether transformers knows this package's ``attn_implementation="chain"``."""
    return AttentionInterface._global_mapping.get(NAME) is chain_attention_forward


def _wrapped(original: Callable[..., Any], replacement: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method that calls ``replacement(original, ...)``, or only ``original`` while not registered."""

    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  what the original returns
        if not is_registered():
            return original(*args, **kwargs)
        return replacement(original, *args, **kwargs)

    return method
