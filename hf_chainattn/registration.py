"""The registration of chain attention with transformers, under the name ``"chain"``.

Four things are needed, and ``unregister`` undoes them: the attention function; the mask function; a class attribute
``PreTrainedConfig.chain_attention``, without which ``from_pretrained(..., chain_attention={...})`` is refused; and
wrappers around methods of ``PreTrainedModel``, listed below, around what writes model cards, see ``card``, and around
what loads and saves adapters, see ``adapters``.
"""

from collections.abc import Callable
from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.generation.continuous_batching import ContinuousMixin

from hf_chainattn.adapters import wrap_adapters
from hf_chainattn.card import wrap_cards
from hf_chainattn.integration import chain_attention_forward, chain_mask
from hf_chainattn.lifecycle import (
    begin_construction,
    begin_continuous_batching,
    begin_gate,
    change_implementation,
    end_construction,
    save_with_name,
)
from hf_chainattn.parts import NAME
from hf_chainattn.wrappers import Wrappers

# methods of PreTrainedModel, and what is called instead, with the method as its first argument
_AROUND: dict[str, Callable[..., Any]] = {
    "__init__": begin_construction,
    "post_init": end_construction,
    "set_attn_implementation": change_implementation,
    "save_pretrained": save_with_name,
    "_initialize_weights": begin_gate,
}


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
    for name, around in _AROUND.items():
        _wrappers.put(PreTrainedModel, name, around)
    _wrappers.put(ContinuousMixin, "init_continuous_batching", begin_continuous_batching)
    wrap_cards(_wrappers)
    wrap_adapters(_wrappers)


def unregister() -> None:
    """Undo ``register``. Models that use chain attention fail at their next forward; disable them first."""
    if not is_registered():
        return
    del AttentionInterface._global_mapping[NAME]
    del AttentionMaskInterface._global_mapping[NAME]
    del PreTrainedConfig.chain_attention
    _wrappers.remove()


def is_registered() -> bool:
    """Return whether transformers knows this package's ``attn_implementation="chain"``."""
    return AttentionInterface._global_mapping.get(NAME) is chain_attention_forward


_wrappers = Wrappers(is_registered)
