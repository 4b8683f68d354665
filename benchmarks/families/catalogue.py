"""The model types of transformers, and the classes that stand for each."""

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Iterator

import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

# the heads that matter: those that generate
_MAPPINGS = (
    modeling_auto.MODEL_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)
_GENERATING = ("ForCausalLM", "ForConditionalGeneration")
# of types that are in none of these mappings: as many classes as any type has there
_OTHERS = 2


def model_types() -> list[str]:
    """Return every model type that ``AutoConfig`` knows, parts of other models included."""
    return sorted(CONFIG_MAPPING_NAMES)


def classes_of(model_type: str) -> list[type[PreTrainedModel]]:
    """Return the classes that are checked for a model type: base model and generating heads, or what else there is.

    Raises:
        ImportError: If a module of transformers needs a library that is not here.
    """
    named = [mapping.get(model_type, ()) for mapping in _MAPPINGS]
    names = dict.fromkeys(name for entry in named for name in ([entry] if isinstance(entry, str) else entry))
    inside = {found.__name__: found for found in _models_beside(CONFIG_MAPPING[model_type])}
    generating = [name for name in inside if name.endswith(_GENERATING)]
    elsewhere = {name: getattr(transformers, name, None) for name in names if name not in inside}
    # what a mapping of transformers names may belong to a part of the type
    found = {name: each for name, each in elsewhere.items() if each is not None and _takes(each, model_type)}
    found |= {name: inside[name] for name in dict.fromkeys([*names, *generating]) if name in inside}
    others = [each for name, each in inside.items() if not name.endswith(("PreTrainedModel", "PretrainedModel"))]
    return list(found.values()) or others[:_OTHERS]


def _takes(model_class: type[PreTrainedModel], model_type: str) -> bool:
    return model_class.config_class is CONFIG_MAPPING[model_type]


def _models_beside(kind: type[PreTrainedConfig]) -> Iterator[type[PreTrainedModel]]:
    """Yield the model classes that are defined in the folder of a config class and take it."""
    for module in _modules(kind.__module__.rpartition(".")[0]):
        for value in vars(module).values():
            if inspect.isclass(value) and issubclass(value, PreTrainedModel) and value.__module__ == module.__name__:
                if value.config_class is kind:
                    yield value


@functools.cache
def _modules(package: str) -> list[object]:
    folder = importlib.import_module(package)
    names = [module.name for module in pkgutil.iter_modules(folder.__path__) if module.name.startswith("modeling_")]
    return [importlib.import_module(f"{package}.{name}") for name in names]
