"""Adapters of PEFT: what attention they were trained with is saved in their folder, and compared at every load.

An adapter folder holds what was learned and how it is built into a model, but no config of the model: on a model with
another attention the same weights compute something else, without a sign. So the config of an adapter is told what its
model uses whenever both are saved. It keeps that under ``chain_attention`` in ``adapter_config.json``, and to load it
into a model that uses something else is an error. PEFT itself warns of the key where this package was not imported.

PEFT is not imported here. Its functions are wrapped once somebody has imported it, those of transformers that load
adapters from the start; ``register`` does both, and ``unregister`` undoes them.
"""

import json
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any
from weakref import WeakSet

from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.peft import PeftAdapterMixin
from transformers.utils import logging

from hf_chainattn.config import ChainAttentionConfig
from hf_chainattn.errors import AdapterError
from hf_chainattn.gates import GATE, ChainGate, gates_of
from hf_chainattn.models import check_savable
from hf_chainattn.parts import named_configs, uses_chain
from hf_chainattn.wrappers import Wrappers

# of the config of an adapter, in memory and in its file
KEY = "chain_attention"

# models whose gamma a schedule sets at every step: what they have now is not what they will be trained with
scheduled: WeakSet[PreTrainedModel] = WeakSet()

# the model that an adapter is being loaded into, and what to call the adapter
_loading: ContextVar[tuple[nn.Module, str] | None] = ContextVar("_loading", default=None)

logger = logging.get_logger(__name__)

# settings of every part of a model that uses chain attention, by the path of its config; that of a whole is ""
Record = Mapping[str, Mapping[str, Any]]


def wrap_adapters(wrappers: Wrappers) -> None:
    """Wrap what adds and loads adapters in transformers, and PEFT when it is imported."""
    wrappers.put(PeftAdapterMixin, "add_adapter", _add_to_model)
    wrappers.put(PeftAdapterMixin, "load_adapter", _load_into_model)
    wrappers.after_import("peft", partial(_wrap_peft, wrappers))


def _wrap_peft(wrappers: Wrappers) -> None:
    # by name: a copy of this file in a model's folder must not seem to need PEFT
    peft = import_module("peft")
    config = import_module("peft.config").PeftConfigMixin
    wrappers.put(config, "save_pretrained", _save_config)
    wrappers.put(config, "from_peft_type", _make_config)
    wrappers.put(peft.PeftModel, "save_pretrained", _save_peft_model)
    # what a mixed model loads goes through this too
    wrappers.put(peft.PeftModel, "load_adapter", _load_into_peft_model)
    for kind in (peft.PeftModel, peft.PeftMixedModel):
        wrappers.put(kind, "__init__", _make_peft_model)
        wrappers.put(kind, "from_pretrained", _load_peft_model)
    wrappers.put(import_module("peft.utils.hotswap"), "hotswap_adapter_from_state_dict", _swap)


def attention_of(model: nn.Module) -> Record:
    """Return what attention a model uses, whatever is wrapped around it; nothing if all of it is ordinary."""
    whole = list(_outermost(model))
    found = {}
    for number, part in enumerate(whole):
        for path, config in named_configs(part.config):
            if uses_chain(config):
                names = ([str(number)] if len(whole) > 1 else []) + ([path] if path else [])
                found[".".join(names)] = ChainAttentionConfig.from_value(config.chain_attention).to_dict()
    return found


def _outermost(module: nn.Module) -> Iterator[PreTrainedModel]:
    if isinstance(module, PreTrainedModel):
        yield module
        return
    for child in module.children():
        yield from _outermost(child)


def stamp(model: nn.Module, configs: Mapping[str, Any], active: Collection[str]) -> None:
    """Tell configs of adapters what attention their model uses, before they are saved.

    Args:
        model: Which has the adapters.
        configs: Of all its adapters, by name.
        active: Names of those that are used. What others know stays: they may have been trained with something else.

    Raises:
        AdapterError: If the model has gates that are trained and would not be saved.
        UnsupportedModelError: If a part of it was switched in a way that cannot be told.
    """
    free = [gate for module in model.modules() if isinstance(gate := module._modules.get(GATE), ChainGate)]
    if any(gate.bias.requires_grad for gate in free):
        for name in active:
            # with this setting PEFT trains and saves whatever is called bias
            if getattr(configs[name], "bias", None) != "all":
                raise AdapterError(
                    f"The gates of chain attention are trained, and the adapter {name!r} does not save them: give its "
                    f"config modules_to_save=[{GATE!r}], or freeze them."
                )
    for part in _outermost(model):
        check_savable(part)
    used = attention_of(model)
    for name, config in configs.items():
        if name in active or KEY not in config.__dict__:
            setattr(config, KEY, used)


def say_if_frozen(model: nn.Module, config: Any) -> None:  # noqa: ANN401  of an adapter
    """Log a warning if a new adapter that will be trained has frozen all gates of its model."""
    gates = gates_of(model)
    if gates and not config.inference_mode and not any(gate.bias.requires_grad for gate in gates):
        logger.warning(
            "This adapter freezes the gates of chain attention, as everything else of the model: gamma stays what it "
            f"is, in spite of learnable=True. To train and save them, give its config modules_to_save=[{GATE!r}]."
        )


def check(model: nn.Module, recorded: Record, name: str) -> None:
    """Raise unless a model uses the attention that an adapter was trained with.

    Args:
        model: Before the adapter is built into it.
        recorded: What the config of the adapter has under ``KEY``.
        name: Of the adapter, for the error.

    Raises:
        AdapterError: If not.
    """
    used = attention_of(model)
    ignore_gamma = any(part in scheduled for part in _outermost(model))
    if _compared(used, ignore_gamma=ignore_gamma) == _compared(recorded, ignore_gamma=ignore_gamma):
        return
    if not recorded:
        way_out = "Load it into an ordinary model; enable_chain_attention can switch that afterwards."
    elif set(recorded) == {""}:
        settings = dict(recorded[""])
        way_out = (
            f"Switch the model before, with enable_chain_attention(model, **{settings!r}), or give from_pretrained "
            f"attn_implementation='chain' and chain_attention={settings!r}."
        )
    else:
        way_out = "Switch the same parts of the model to the same settings before."
    raise AdapterError(
        f"The adapter {str(name)!r} was trained with {_described(recorded)}, and this model uses {_described(used)}, "
        f"where its weights mean something else. {way_out}"
    )


def _compared(record: Record, *, ignore_gamma: bool) -> Record:
    if ignore_gamma:
        return {path: {key: value for key, value in part.items() if key != "gamma"} for path, part in record.items()}
    # a gamma of 0 is ordinary attention
    return {path: part for path, part in record.items() if part.get("gamma") != 0.0}


def _described(record: Record) -> str:
    if not record:
        return "ordinary attention"
    return "chain attention at " + " and ".join(
        f"{dict(part)!r}{f' in {path}' if path else ''}" for path, part in record.items()
    )


@contextmanager
def _loading_into(model: nn.Module | None, name: str = "") -> Iterator[None]:
    """Check every config of an adapter that is read in this block against a model, or none."""
    token = _loading.set(None if model is None else (model, name))
    try:
        yield
    finally:
        _loading.reset(token)


def _read(folder: str, options: Mapping[str, Any]) -> None:
    """Read the config of an adapter, because an adapter whose name is known to PEFT is loaded without a look at it."""
    with warnings.catch_warnings():
        # those that are needed come from the load itself
        warnings.simplefilter("ignore")
        import_module("peft").PeftConfig.from_pretrained(folder, **options)


def _save_config(original: Callable[..., Any], config: Any, save_directory: str, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
    original(config, save_directory, *args, **kwargs)
    if record := config.__dict__.get(KEY):
        path = Path(save_directory) / "adapter_config.json"
        stored = json.loads(path.read_text("utf8"))
        # of a whole as in its own config.json
        stored[KEY] = record[""] if set(record) == {""} else record
        path.write_text(json.dumps(stored, indent=2, sort_keys=True), "utf8")


def _make_config(original: Callable[..., Any], cls: type, **kwargs: Any) -> Any:  # noqa: ANN401  a config
    stored = kwargs.pop(KEY, None) or {}
    record = {"": stored} if "gamma" in stored else stored
    if (loading := _loading.get()) is not None:
        check(loading[0], record, loading[1])
    # called again by itself where PEFT meets another key that it does not know
    with _loading_into(None):
        config = original(cls, **kwargs)
    setattr(config, KEY, record)
    return config


def _save_peft_model(original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
    stamp(model, model.peft_config, model.active_adapters)
    original(model, *args, **kwargs)


def _make_peft_model(
    original: Callable[..., Any],
    made: Any,  # noqa: ANN401
    model: nn.Module,
    peft_config: Any,  # noqa: ANN401
    *args: Any,
    **kwargs: Any,
) -> None:
    original(made, model, peft_config, *args, **kwargs)
    say_if_frozen(made, peft_config)


def _load_peft_model(
    original: Callable[..., Any], cls: type, model: nn.Module, model_id: str, *args: Any, **kwargs: Any
) -> Any:  # noqa: ANN401  the model with its adapter
    with _loading_into(model, model_id):
        _read(model_id, kwargs)
        return original(cls, model, model_id, *args, **kwargs)


def _load_into_peft_model(
    original: Callable[..., Any],
    model: nn.Module,
    model_id: str,
    *args: Any,
    **kwargs: Any,
) -> Any:  # noqa: ANN401  what was loaded
    with _loading_into(model, model_id):
        _read(model_id, kwargs)
        return original(model, model_id, *args, **kwargs)


def _swap(
    original: Callable[..., Any],
    model: nn.Module,
    state_dict: Any,  # noqa: ANN401
    adapter_name: str,
    config: Any,  # noqa: ANN401
    *args: Any,
    **kwargs: Any,
) -> None:
    # a config that was not loaded knows nothing
    if KEY in config.__dict__:
        check(model, getattr(config, KEY), adapter_name)
    original(model, state_dict, adapter_name, config, *args, **kwargs)


def _add_to_model(
    original: Callable[..., Any],
    model: PreTrainedModel,
    adapter_config: Any,  # noqa: ANN401
    *args: Any,
    **kwargs: Any,
) -> None:
    original(model, adapter_config, *args, **kwargs)
    say_if_frozen(model, adapter_config)


def _load_into_model(
    original: Callable[..., Any],
    model: PreTrainedModel,
    peft_model_id: str | None = None,
    adapter_name: str | None = None,
    peft_config: Any = None,  # noqa: ANN401
    *args: Any,
    **kwargs: Any,
) -> Any:  # noqa: ANN401  what was loaded
    name = str(peft_model_id or adapter_name or "default")
    if peft_config is not None and KEY in peft_config.__dict__:
        check(model, getattr(peft_config, KEY), name)
    with _loading_into(model, name):
        return original(model, peft_model_id, adapter_name, peft_config, *args, **kwargs)
