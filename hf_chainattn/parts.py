"""Models that are made of several models: which part becomes a chain when the whole is asked to."""

from collections.abc import Iterable, Iterator
from typing import Any

from transformers import PreTrainedConfig

from hf_chainattn.errors import UnsupportedModelError

NAME = "chain"
# one of these in a config says that its model attends by itself, and not only its parts do
_HEADS = (
    "num_attention_heads",
    "n_head",
    "n_heads",
    "num_heads",
    "decoder_attention_heads",
    "encoder_attention_heads",
)


def uses_chain(config: PreTrainedConfig) -> bool:
    """Return whether a model with this config dispatches to chain attention."""
    return bool(config._attn_implementation == NAME)


def decoder_key(config: PreTrainedConfig) -> str | None:
    """Return the name of the sub-config of the causal text decoder; ``None`` if the model is not made of several.

    The name is empty where the decoder runs on the config of the whole, beside parts with configs of their own.

    Raises:
        UnsupportedModelError: If the model is made of several and has no such part.
    """
    parts, text = _parts(config), config.get_text_config(decoder=True)
    key = next((key for key, part in parts.items() if part is text), None)
    if key is not None or not parts:
        return key
    # encoder-decoders hand out a copy of themselves
    if type(text) is type(config) and any(name in vars(config) for name in _HEADS):
        return ""
    if text is config:
        return None
    raise UnsupportedModelError(
        f"{type(config).__name__} is made of several models ({', '.join(parts)}) without one text decoder: ask "
        f"for chain attention by part, with a dict such as attn_implementation={{'{list(parts)[-1]}': 'chain'}}."
    )


def narrow(config: PreTrainedConfig) -> None:
    """Let the request of a whole model for chain attention be one of its text decoder alone, with its settings.

    Towers and encoders of other models read their input at once; a walk of theirs must be asked for by part.
    """
    if not uses_chain(config):
        # asked for by part: what was given for the whole is for every part that is asked for
        asked = [part for part in _parts(config).values() if uses_chain(part)]
        if asked and config.chain_attention is not None:
            settings = config.__dict__.pop("chain_attention")
            for part in asked:
                part.chain_attention = settings
        return
    key = decoder_key(config)
    if key is None:
        return
    hand_down(config, key)
    if key:
        # None: what transformers would choose; not by the property, which would set every part
        config._attn_implementation_internal = None
    for name, part in _parts(config).items():
        # of a model whose whole is the decoder, a saved part with settings of its own was asked for beside it
        if name != key and uses_chain(part) and (key or part.chain_attention is None):
            part._attn_implementation = None


def hand_down(config: PreTrainedConfig, key: str) -> None:
    """Move the settings of the whole to the part that runs them: attention modules see only their own config."""
    if key and config.chain_attention is not None:
        getattr(config, key).chain_attention = config.__dict__.pop("chain_attention")


def share(config: PreTrainedConfig, others: Iterable[PreTrainedConfig]) -> None:
    """Give the settings of the whole to the copies that some models, T5 among them, make of it for their stacks."""
    for other in others:
        if other is not config and type(other) is type(config) and not is_inside(config, other) and uses_chain(config):
            other.chain_attention = config.chain_attention


def named_configs(config: PreTrainedConfig) -> Iterator[tuple[str, PreTrainedConfig]]:
    """Yield a config under the name ``""`` and all inside it under dotted ones, such as ``text_config``."""
    yield "", config
    for key, part in _parts(config).items():
        for name, inner in named_configs(part):
            yield f"{key}.{name}" if name else key, inner


def parts_asked(config: PreTrainedConfig, request: str | dict[str, Any] | None) -> Iterator[PreTrainedConfig]:
    """Yield the configs, this one and those inside it, for which a request names chain attention."""
    if request == NAME:
        yield config
    elif isinstance(request, dict):
        if request.get("") == NAME:
            yield config
        for key, part in _parts(config).items():
            yield from parts_asked(part, request.get(key))


def all_configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """Yield a config and those inside it, at any depth."""
    for _, inner in named_configs(config):
        yield inner


def is_inside(config: PreTrainedConfig, other: object) -> bool:
    """Return whether ``other`` is a sub-config of ``config`` at any depth, itself and not a copy."""
    return other is not config and any(inner is other for inner in all_configs(config))


def _parts(config: PreTrainedConfig) -> dict[str, PreTrainedConfig]:
    parts = {key: getattr(config, key, None) for key in config.sub_configs}
    return {key: part for key, part in parts.items() if isinstance(part, PreTrainedConfig)}
