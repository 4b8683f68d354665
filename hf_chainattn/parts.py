"""Models that are made of several models: which part becomes a chain when the whole is asked to."""

from collections.abc import Iterable, Iterator

from transformers import PreTrainedConfig

from hf_chainattn.errors import UnsupportedModelError

NAME = "chain"


def uses_chain(config: PreTrainedConfig) -> bool:
    """Return whether a model with this config dispatches to chain attention."""
    return bool(config._attn_implementation == NAME)


def decoder_key(config: PreTrainedConfig) -> str | None:
    """Return the name of the sub-config of the causal text decoder; ``None`` if the model is not made of several.

    Raises:
        UnsupportedModelError: If the model is made of several and has no such part.
    """
    parts = _parts(config)
    if not parts or config.get_text_config(decoder=True) is config:
        return None
    key = decoder_key_or_none(config)
    if key is None:
        raise UnsupportedModelError(
            f"{type(config).__name__} is made of several models ({', '.join(parts)}) without one text decoder: ask "
            f"for chain attention by part, with a dict such as attn_implementation={{'{list(parts)[-1]}': 'chain'}}."
        )
    return key


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
    # None: what transformers would choose; not by the property, which would set every part
    config._attn_implementation_internal = None
    for name, part in _parts(config).items():
        if name != key and uses_chain(part):
            part._attn_implementation = None


def hand_down(config: PreTrainedConfig, key: str) -> None:
    """Move the settings of the whole to the part that runs them: attention modules see only their own config."""
    if config.chain_attention is not None:
        getattr(config, key).chain_attention = config.__dict__.pop("chain_attention")


def share(config: PreTrainedConfig, others: Iterable[PreTrainedConfig]) -> None:
    """Give the settings of the whole to the copies that some models, T5 among them, make of it for their stacks."""
    own = {id(part) for part in _parts(config).values()}
    for other in others:
        if other is not config and type(other) is type(config) and id(other) not in own and uses_chain(config):
            other.chain_attention = config.chain_attention


def named_configs(config: PreTrainedConfig) -> Iterator[tuple[str, PreTrainedConfig]]:
    """Yield a config under the name ``""`` and all inside it under dotted ones, such as ``text_config``."""
    yield "", config
    for key, part in _parts(config).items():
        for name, inner in named_configs(part):
            yield f"{key}.{name}" if name else key, inner


def _parts(config: PreTrainedConfig) -> dict[str, PreTrainedConfig]:
    return {key: part for key in config.sub_configs if (part := getattr(config, key, None)) is not None}


def decoder_key_or_none(config: PreTrainedConfig) -> str | None:
    """Return the name of the sub-config of the causal text decoder, ``None`` if there is none."""
    text = config.get_text_config(decoder=True)
    return next((key for key, part in _parts(config).items() if part is text), None)
