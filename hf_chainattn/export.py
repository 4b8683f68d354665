"""A saved model that brings the code of chain attention with it, for readers who have not installed the package."""

import re
from importlib.metadata import version
from pathlib import Path

from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from hf_chainattn.errors import UnsupportedModelError
from hf_chainattn.models import parts_of
from hf_chainattn.parts import uses_chain

_PACKAGE = Path(__file__).parent
_MODULE = "modeling_chain"
_ORIGIN = f"# a copy from hf-chain-highway-certify {version('hf-chain-highway-certify')}, Apache License 2.0\n"
# of a file in the package; a copy is called hf_chainattn_api.py and imports its neighbours
_IMPORT = re.compile(r"^from hf_chainattn\.(\w+) import", re.MULTILINE)

_TEXT = '''"""{base} with chain attention, for ``from_pretrained(..., trust_remote_code=True)``.

Uses the package hf-chain-highway-certify if it is installed, else the copy of it in the files beside this one.
"""

from transformers import AttentionInterface
from transformers import {base} as _Base

try:
    import hf_chainattn
except ImportError:
    # another model may have brought its copy before
    if "chain" not in AttentionInterface():
        from .hf_chainattn_registration import register

        register()


class Chain{base}(_Base):
    """{base}; its attention is what ``config.chain_attention`` says."""
'''


def save_with_code(model: PreTrainedModel, folder: str | Path) -> None:
    """Save a model together with the code that computes its attention.

    The folder can be loaded by ``AutoModel*.from_pretrained(folder, trust_remote_code=True)`` without this package,
    and by everything that loads what ``save_pretrained`` wrote, given the package. The code is a copy of this version:
    later corrections do not reach it. Where readers can install the package, ``save_pretrained`` is the better choice.

    Args:
        model: With chain attention, of a class of transformers that one of its Auto classes knows.
        folder: Where to; ``push_to_hub`` it with ``huggingface_hub.upload_folder``.

    Raises:
        UnsupportedModelError: If the model does not use chain attention, or no Auto class knows its class.

    Example:
        >>> import pathlib, tempfile
        >>> from transformers import AutoModelForCausalLM, GPT2Config
        >>> from hf_chainattn import enable_chain_attention, save_with_code
        >>> config = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11, bos_token_id=1, eos_token_id=2)
        >>> model = enable_chain_attention(AutoModelForCausalLM.from_config(config))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_with_code(model, folder)
        ...     print((pathlib.Path(folder) / "modeling_chain.py").exists(), model.config.auto_map)
        True None
    """
    name = type(model).__name__
    if not any(uses_chain(part.config) for part in parts_of(model)):
        raise UnsupportedModelError(f"{name} does not use chain attention: save it with save_pretrained.")
    known = _auto_classes_of(model)
    if not known:
        raise UnsupportedModelError(f"{name} is not a class that an Auto class of transformers loads.")
    before = getattr(model.config, "auto_map", None)
    model.config.auto_map = dict.fromkeys(known, f"{_MODULE}.Chain{name}")
    try:
        model.save_pretrained(folder)
    finally:
        model.config.auto_map = before
    (Path(folder) / f"{_MODULE}.py").write_text(_TEXT.format(base=name), encoding="utf-8")
    for module in sorted(_needed("registration")):
        source = (_PACKAGE / f"{module}.py").read_text(encoding="utf-8")
        copied = _ORIGIN + _IMPORT.sub(r"from .hf_chainattn_\1 import", source)
        (Path(folder) / f"hf_chainattn_{module}.py").write_text(copied, encoding="utf-8")


def _auto_classes_of(model: PreTrainedModel) -> list[str]:
    """Return the names of the Auto classes that load the class of a model."""
    found = []
    for auto, kind in vars(modeling_auto).items():
        mapping = getattr(kind, "_model_mapping", None) if auto.startswith("AutoModel") else None
        if mapping is not None and type(model.config) in mapping:
            loaded = mapping[type(model.config)]
            if type(model) in (loaded if isinstance(loaded, tuple) else (loaded,)):
                found.append(auto)
    return sorted(found)


def _needed(module: str) -> set[str]:
    """Return the names of a file of the package and of all that it imports from it."""
    found, waiting = set(), [module]
    while waiting:
        if (name := waiting.pop()) not in found:
            found.add(name)
            waiting += _IMPORT.findall((_PACKAGE / f"{name}.py").read_text(encoding="utf-8"))
    return found
