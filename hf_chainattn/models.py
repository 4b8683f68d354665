"""Which transformers models can run with chain attention, and making one ready for it or ordinary again."""

import inspect
import sys
from collections.abc import Iterator, Sequence
from types import CodeType
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from hf_chainattn.calls import place_of, set_place, unwatch, watch
from hf_chainattn.config import ChainAttentionConfig, Diagonal, Gamma
from hf_chainattn.errors import UnsupportedModelError
from hf_chainattn.gates import keep_in_float32, set_gate
from hf_chainattn.parts import NAME, decoder_key, is_inside, named_configs, uses_chain

# of models with chain attention on the Hub
TAG = "chain-attention"
# modules that dispatch twice and subtract: the difference of two chains is not the chain of the difference
_DIFFERENTIAL = ("DiffLlamaAttention",)
# what a forward that attends by itself calls
_SOFTMAXES = frozenset({"softmax", "scaled_dot_product_attention"})
# model types whose other layers read the attention mask too, as eager attention has it: NLLB's router of experts
_MASK_READERS = ("nllb-moe",)

logger = logging.get_logger(__name__)


def enable_chain_attention(
    model: PreTrainedModel,
    *,
    gamma: Gamma = 0.9,
    diagonal: Diagonal = "kept",
    layers: Sequence[int] | None = None,
    encoder: bool = False,
    learnable: bool = False,
    per_head: bool = False,
) -> PreTrainedModel:
    """Switch a model that is already in memory to chain attention, in place, and return it.

    The same as ``from_pretrained(..., attn_implementation="chain")`` with ``config.chain_attention`` set. Settings are
    written to ``model.config``, so that ``save_pretrained`` keeps them; in a model made of several, to the config of
    its text decoder, which alone becomes a chain.

    Args:
        model: Any transformers model whose self-attention goes through the attention interface.
        gamma: Chance of one more hop, in ``[0, 1)``, of all layers or of each. With 0 the outputs are those of
            ordinary attention.
        diagonal: ``"kept"`` or ``"removed"``, see ``ChainAttentionConfig``, as for the next two.
        layers: Which layers chain; ``None``: all.
        encoder: Whether the encoder of an encoder-decoder chains too.
        learnable: Whether gamma is a parameter that begins at ``gamma``.
        per_head: Whether every head has one of its own then.

    Raises:
        TypeError: If ``model`` is no transformers model.
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
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}.")
    settings = ChainAttentionConfig(
        gamma=gamma, diagonal=diagonal, layers=layers, encoder=encoder, learnable=learnable, per_head=per_head
    )
    key = decoder_key(model.config)
    if encoder and not any(_on_encoder_side(model, name, module) for name, module in dispatching_modules(model)):
        raise ValueError(
            "encoder=True is for a model whose encoder and decoder have one config: ask for another encoder by part, "
            "with set_attn_implementation({'encoder': 'chain'})."
        )
    config = getattr(model.config, key) if key else model.config
    before = config.__dict__.get("chain_attention")
    config.chain_attention = settings.to_dict()
    try:
        model.set_attn_implementation(NAME)
    except Exception:
        if before is None:
            del config.chain_attention
        else:
            config.chain_attention = before
        raise
    return model


def disable_chain_attention(model: PreTrainedModel, *, attn_implementation: str = "sdpa") -> PreTrainedModel:
    """Return the model to an ordinary attention implementation, in place, and return it.

    Hooks, gates and config entries of this package are gone afterwards; other weights were never touched.

    Args:
        model: A model with chain attention; on any other it only sets the implementation.
        attn_implementation: What to use instead.
    """
    model.set_attn_implementation(attn_implementation)
    for part in parts_of(model):
        release_model(part)
        part.config.__dict__.pop("chain_attention", None)
    for module in model.modules():
        set_gate(module, None)
    return model


def parts_of(model: PreTrainedModel) -> list[PreTrainedModel]:
    """Return the model and every transformers model inside it."""
    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]


def dispatching_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield name and module of every part of ``model`` whose own forward calls the attention interface."""
    for name, module in model.named_modules():
        code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
        if code is not None and {"ALL_ATTENTION_FUNCTIONS", "get_interface"} <= set(code.co_names):
            yield name, module


def _modules_to_chain(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Yield the dispatching modules of a model without those of its parts that stay ordinary."""
    for name, module in dispatching_modules(model):
        config = getattr(module, "config", None)
        if config is None or uses_chain(config) or not is_inside(model.config, config):
            yield name, module


def _attending_alone(model: PreTrainedModel) -> Iterator[str]:
    """Yield the names of modules whose own forward is a self-attention that never calls the attention interface.

    Parts that have a config of their own are asked for, and looked at, by themselves.
    """
    parts: list[str] = []
    for name, module in model.named_modules():
        if is_inside(model.config, getattr(module, "config", None)):
            parts.append(f"{name}.")
        code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
        if code is None or f"{name}.".startswith(tuple(parts)) or not _is_self_attention(type(module)):
            continue
        if _SOFTMAXES & set(code.co_names) and "get_interface" not in code.co_names and not is_cross_attention(name):
            yield name


def _is_self_attention(kind: type[nn.Module]) -> bool:
    """Return whether a module class that takes a softmax is self-attention, by its name and its arguments."""
    parameters = list(inspect.signature(kind.forward).parameters)
    if "Attention" not in kind.__name__ or "Pooling" in kind.__name__ or parameters[1:2] != ["hidden_states"]:
        return False
    # deformable attention reads an image at such points
    return "reference_points" not in parameters


def check_model(model: PreTrainedModel) -> None:
    """Raise unless every module of ``model`` that would run as a chain is self-attention that really dispatches.

    Layers of another kind, such as the linear attention of a hybrid model, stay as they are.

    Raises:
        UnsupportedModelError: For a model whose attention never looks at the attention interface, or in which queries
            and keys may be different tokens in a way that is not known here.
    """
    kind = type(model).__name__
    if model.config.model_type in _MASK_READERS:
        raise UnsupportedModelError(
            f"{kind} reads the attention mask of eager attention outside of its attention too, and would read that of "
            "chain attention wrongly: use attn_implementation='eager' here."
        )
    if not any(dispatching_modules(model)):
        raise never_dispatches(kind)
    for name, module in _modules_to_chain(model):
        _check_module(kind, name, module)
    if (alone := next(_attending_alone(model), None)) is not None:
        raise UnsupportedModelError(
            f"{kind} attends in {alone} without the attention interface, which only others of its modules call, and "
            "would be a chain in part: use attn_implementation='eager' here."
        )


def never_dispatches(kind: str) -> UnsupportedModelError:
    """Return the error for a model class whose attention does not look at the attention interface."""
    return UnsupportedModelError(
        f"{kind} accepts attn_implementation='chain' but never calls the attention interface, so that the setting "
        "would silently change nothing. Use a model type whose attention dispatches (GPT-2, Llama, BERT, ViT and "
        "most others), or attn_implementation='eager' here."
    )


def check_part(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Raise unless a model with this config, itself or one inside it, has become a chain: transformers only logs that.

    Raises:
        UnsupportedModelError: If it cannot switch, or there is no such model.
    """
    if not uses_chain(config):
        raise never_dispatches(type(model).__name__)
    if not any(part.config is config for part in parts_of(model)):
        raise UnsupportedModelError(
            f"{type(model).__name__} was asked for chain attention in its {type(config).__name__}, and has no "
            "transformers model inside that runs on it: ask for another part."
        )


def check_class(kind: type[PreTrainedModel]) -> None:
    """Raise if a model class cannot be built as a chain, before its modules are: that would end in a bare KeyError.

    Raises:
        UnsupportedModelError: If its attention never looks at the attention interface, or is picked by the name of the
            implementation from a table that does not have this one.
    """
    if not kind._can_set_attn_implementation():
        raise never_dispatches(kind.__name__)
    if (table := _table_of_attentions(kind)) is not None:
        raise UnsupportedModelError(
            f"{kind.__name__} picks the class of its attention from {table}, which does not know chain attention: use "
            "attn_implementation='eager' here."
        )


def _table_of_attentions(kind: type[nn.Module]) -> str | None:
    """Return the name of a table of attention classes without ours that building a module would look into."""
    names, reached, waiting = vars(sys.modules[kind.__module__]), {kind}, [kind]
    while waiting:
        for name in _names_in(getattr(inspect.unwrap(waiting.pop().__init__), "__code__", None)):
            value = names.get(name)
            if isinstance(value, dict) and "eager" in value and NAME not in value:
                return name
            if inspect.isclass(value) and issubclass(value, nn.Module) and value not in reached:
                reached.add(value)
                waiting.append(value)
    return None


def _names_in(code: CodeType | None) -> Iterator[str]:
    """Yield the names that a function uses, in comprehensions inside it too."""
    if code is not None:
        yield from code.co_names
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                yield from _names_in(constant)


def check_undivided(model: PreTrainedModel) -> None:
    """Raise if a model is divided over processes by tensor parallelism, or will be when its weights are loaded.

    Each process would have some of the heads of a layer. Gates, lists of gammas and caches are not divided with them.

    Raises:
        UnsupportedModelError: If so.
    """
    # the first is there before the model is built, the second after it has been divided
    planned = getattr(model.config, "distributed_config", None)
    for size in (getattr(planned, "tp_size", None), *(part._tp_size for part in parts_of(model))):
        if size is not None and size > 1:
            raise divided(type(model).__name__, f"{size} processes")


def divided(kind: str, how: str) -> UnsupportedModelError:
    """Return the error for a model or module whose heads are divided by tensor parallelism."""
    return UnsupportedModelError(
        f"{kind} is divided over {how} by tensor parallelism, and the gates, gammas and caches of chain attention are "
        "not: load it without tp_plan, tp_size or a DistributedConfig with tp_size > 1; data parallelism is supported."
    )


def _check_module(kind: str, name: str, module: nn.Module) -> None:
    arguments = [argument for argument in inspect.signature(type(module).forward).parameters if argument != "self"]
    if arguments[:1] != ["hidden_states"]:
        raise UnsupportedModelError(
            f"{kind} has an attention module {name} whose queries and keys may be different tokens (it takes "
            f"{arguments[:3]}), and no chain exists across them: use attn_implementation='sdpa' here."
        )
    if type(module).__name__ in _DIFFERENTIAL:
        raise UnsupportedModelError(
            f"{kind} subtracts two attentions in {name}, and chain attention is not defined for their difference: use "
            "attn_implementation='sdpa' here."
        )


def prepare_model(model: PreTrainedModel) -> None:
    """Check a model that asks for chain attention, guard its attention modules, and complete its config.

    Runs at the end of every model construction and after every change of the attention implementation. Idempotent.

    Raises:
        UnsupportedModelError: See ``check_model``.
        ValueError: If ``config.chain_attention`` holds a bad value.
    """
    settings = ChainAttentionConfig.from_value(model.config.chain_attention)
    check_model(model)
    if model.config.chain_attention is None:
        logger.warning_once(
            f"{type(model).__name__} has no `chain_attention` entry in its config and takes gamma={settings.gamma}. "
            "Weights that were trained with ordinary attention have not learned to use it. Set config.chain_attention "
            "= {'gamma': 0.9} to say that this is meant, or {'gamma': 0.0} for ordinary outputs."
        )
    model.config.chain_attention = settings.to_dict()
    keep_in_float32(model)
    for position, (_, module) in enumerate(_modules_to_chain(model)):
        watch(module, position)


def mark_places(model: PreTrainedModel) -> None:
    """Tell the attention modules of the outermost model which layers they are, and give them gates.

    Raises:
        ValueError: If settings name layers or heads that do not exist, or leave some out.
    """
    for name, module in dispatching_modules(model):
        if (place := place_of(module)) is None:
            continue
        in_encoder = _on_encoder_side(model, name, module)
        heads = _heads_of(module)
        set_place(module, place._replace(in_encoder=in_encoder, heads=heads))
        settings = ChainAttentionConfig.from_value(getattr(module.config, "chain_attention", None))
        start = settings.start_of(place.number, heads, in_encoder=in_encoder)
        set_gate(module, None if is_cross_attention(name) else start)
        if not in_encoder:
            settings.check_layer(place.number, heads, _layers_of(module))


def is_cross_attention(name: str) -> bool:
    """Return whether a module's name says that it attends to an encoder: its gate would never be used."""
    # BERT's is called crossattention.self, BART's encoder_attn, T5's EncDecAttention
    last = name.lower().split(".")[-2:]
    return any("cross" in part for part in last) or any(word in last[-1] for word in ("encoder", "encdec"))


def _heads_of(module: nn.Module) -> int | None:
    """Return the number of query heads of an attention module, ``None`` if neither it nor its config says."""
    for name in ("num_heads", "num_attention_heads", "n_heads", "n_head"):
        if isinstance(heads := getattr(module, name, None), int):
            return heads
    heads = getattr(module.config, "num_attention_heads", None)
    return heads if isinstance(heads, int) else None


def _layers_of(module: nn.Module) -> int | None:
    """Return the number of layers of the stack of an attention module, ``None`` if its config does not say."""
    for name in ("decoder_layers", "num_decoder_layers", "num_hidden_layers"):
        if isinstance(layers := getattr(module.config, name, None), int):
            return layers
    return None


def _on_encoder_side(model: PreTrainedModel, name: str, module: nn.Module) -> bool:
    """Return whether an attention module is one of the encoder of an encoder-decoder.

    Where encoder and decoder have configs of their own, each is asked for by itself and counts as a model of its own.
    """
    config = getattr(module, "config", None)
    if not getattr(model.config, "is_encoder_decoder", False) or is_inside(model.config, config):
        return False
    return _in_encoder(name) or getattr(module, "is_decoder", None) is False


def _in_encoder(name: str) -> bool:
    """Return whether a module's path leads into the encoder: ``decoder.bert.encoder`` does not."""
    sides = [part for part in name.split(".") if "encoder" in part or "decoder" in part]
    return bool(sides) and "decoder" not in sides[0]


def release_model(model: PreTrainedModel) -> None:
    """Take the guards of ``prepare_model`` off a model; its settings stay, for a switch back. Idempotent.

    A part inside the model that still uses chain attention keeps its guards.
    """
    for _, module in dispatching_modules(model):
        if (config := getattr(module, "config", None)) is not None and uses_chain(config):
            continue
        # a gate stays, for a switch back: what it has learned would be lost
        unwatch(module)


def tag(model: PreTrainedModel) -> None:
    """Give the outermost model the tag that reaches its model card, also through Trainer, or take it away."""
    if any(uses_chain(part.config) for part in parts_of(model)):
        model.add_model_tags(TAG)
    elif TAG in (model.model_tags or ()):
        model.model_tags.remove(TAG)


def check_savable(model: PreTrainedModel) -> None:
    """Raise if a part of a model uses chain attention and no config that is saved with the model says so.

    Raises:
        UnsupportedModelError: If so; a reload would be ordinary.
    """
    saved = [config for _, config in named_configs(model.config)]
    for name, part in model.named_modules():
        if not isinstance(part, PreTrainedModel) or not uses_chain(part.config):
            continue
        # some models make copies of their config for their stacks
        if not any(uses_chain(config) for config in saved if type(config) is type(part.config)):
            raise UnsupportedModelError(
                f"{type(model).__name__} would be saved without the chain attention of {name}, whose config is a copy "
                "that is not saved: switch the whole model with enable_chain_attention(model)."
            )


def name_in_config(config: PreTrainedConfig) -> None:
    """Write what ``from_pretrained`` must ask for into the config, or remove it where no part uses chain attention.

    transformers does not save the attention implementation. As a plain attribute it reaches ``config.json``, and a
    reload then uses chain attention, or fails by name where this package was not imported.
    """
    if (asked := _asked_for(config)) is not None:
        config.attn_implementation = asked
    else:
        config.__dict__.pop("attn_implementation", None)


def _asked_for(config: PreTrainedConfig) -> str | dict[str, Any] | None:
    """Return the ``attn_implementation`` that brings back what this config and its sub-configs use."""
    own = NAME if uses_chain(config) else None
    inner = {key: sub for key in config.sub_configs if (sub := getattr(config, key, None)) is not None}
    asked: dict[str, Any] = {key: value for key, sub in inner.items() if (value := _asked_for(sub)) is not None}
    if not asked or (own and all(value == NAME for value in asked.values()) and len(asked) == len(inner)):
        return own
    return asked | ({"": own} if own else {})
