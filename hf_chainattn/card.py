"""The section of a model card that says how attention is computed, kept wherever transformers writes a card.

transformers writes ``README.md`` in three places: ``push_to_hub`` of a model, ``save_pretrained(push_to_hub=True)``,
and the summary that Trainer publishes. Each would overwrite the section, so each is completed before it is uploaded.
"""

import re
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import transformers
from huggingface_hub import ModelCard, ModelCardData
from torch import nn
from transformers import PreTrainedModel

from hf_chainattn.models import TAG, parts_of
from hf_chainattn.parts import uses_chain
from hf_chainattn.summary import layer_groups
from hf_chainattn.wrappers import Wrappers

if TYPE_CHECKING:
    from transformers.modelcard import TrainingSummary

_BEGIN, _END = "<!-- hf_chainattn: begin -->", "<!-- hf_chainattn: end -->"
_SECTION = re.compile(rf"\n*{re.escape(_BEGIN)}.*?{re.escape(_END)}\n*", re.DOTALL)
_CARD = "README.md"

_TEXT = """\
## How attention is computed

This model computes **chain attention**, `Y = (1 - gamma) A (I - gamma A)^-1 V` (arXiv
[2410.05565](https://arxiv.org/abs/2410.05565)), where its architecture has ordinary attention. transformers cannot do
that by itself: `pip install hf-chain-highway-certify`, and import the package before the model is loaded{or_code}.

```python
import hf_chainattn
from transformers import {name}

model = {name}.from_pretrained("path or name of this repository")
```

| attention layers | number | computed as | diagonal |
| --- | --- | --- | --- |
{rows}

Without the import, loading ends in

    ValueError: Specified `attn_implementation="chain"` is not supported.

**Do not follow the advice of that message** to load with `"eager"`. That, or `attn_implementation="sdpa"`, computes
ordinary attention, which these weights were not trained for. Servers with attention kernels of their own, such as vLLM
and llama.cpp, do not compute chain attention either.
"""


def update_model_card(model: nn.Module, folder: str | Path) -> None:
    """Write, renew or remove the section "How attention is computed" in the model card of a folder.

    ``save_pretrained``, ``push_to_hub`` and Trainer do it by themselves. It is for cards that other tools write: call
    it after them. What else the card says stays as it is.

    Args:
        model: A transformers model, or a module around one.
        folder: Where the model was saved; ``README.md`` in it is the card. It is made if there is none and the model
            uses chain attention.

    Example:
        >>> import pathlib, tempfile
        >>> from transformers import AutoModel, GPT2Config
        >>> from hf_chainattn import enable_chain_attention, update_model_card
        >>> config = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11, bos_token_id=1, eos_token_id=2)
        >>> model = enable_chain_attention(AutoModel.from_config(config))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     update_model_card(model, folder)
        ...     print("chain-attention" in (pathlib.Path(folder) / "README.md").read_text())
        True
    """
    path, section = Path(folder) / _CARD, attention_section(model)
    if path.exists():
        before = path.read_text(encoding="utf-8")
    elif section is not None and path.parent.is_dir():
        metadata = ModelCardData(library_name="transformers").to_yaml()
        before = f"---\n{metadata}\n---\n\n# {_title(model)}\n"
    else:
        return
    after = _with_section(before, section)
    if after != before:
        path.write_text(_with_tag(after, present=section is not None), encoding="utf-8")


def attention_section(model: nn.Module) -> str | None:
    """Return the section, ``None`` for a model that does not use chain attention."""
    if not any(uses_chain(part.config) for part in parts_of(model)):
        return None
    rows = [
        f"| `{group.name}` | {group.layers} | {group.gamma} | {group.diagonal if group.gammas != (0.0,) else ''} |"
        for group in layer_groups(model)
    ]
    name = _title(model)
    or_code = ", or load it\nwith `trust_remote_code=True`, which runs the copy of the package in this repository"
    return _TEXT.format(
        name=name if hasattr(transformers, name) else "AutoModel",
        or_code=or_code if getattr(model.config, "auto_map", None) else "",
        rows="\n".join(rows),
    )


def wrap_cards(wrappers: Wrappers) -> None:
    """Wrap what uploads a model, and what writes the card of Trainer when that is imported."""
    wrappers.put(PreTrainedModel, "_upload_modified_files", _complete_upload)
    wrappers.after_import("transformers.modelcard", partial(_wrap_summary, wrappers))


def _wrap_summary(wrappers: Wrappers) -> None:
    summary = import_module("transformers.modelcard").TrainingSummary
    wrappers.put(summary, "from_trainer", _describe_training)
    wrappers.put(summary, "to_model_card", _write_training)


def _complete_upload(
    original: Callable[..., Any], model: PreTrainedModel, working_dir: str, *args: Any, **kwargs: Any
) -> Any:  # noqa: ANN401  what the original returns
    """Complete the card that ``push_to_hub`` has just written, then upload."""
    update_model_card(model, working_dir)
    return original(model, working_dir, *args, **kwargs)


def _describe_training(original: Callable[..., Any], cls: "type[TrainingSummary]", trainer: Any, **kwargs: Any) -> Any:  # noqa: ANN401
    """Let the summary that Trainer makes of a training know the section."""
    summary = original(cls, trainer, **kwargs)
    summary.attention_section = attention_section(trainer.model)
    return summary


def _write_training(original: Callable[..., str], summary: "TrainingSummary") -> str:
    """Return the card of such a summary with the section in it."""
    return _with_section(original(summary), getattr(summary, "attention_section", None))


def _with_section(card: str, section: str | None) -> str:
    """Return a card with the section in its old place, or at the end, or without it."""
    marked = "" if section is None else f"\n\n{_BEGIN}\n{section}{_END}\n"
    if _SECTION.search(card):
        # a function: a backslash in the section is no group
        return _SECTION.sub(lambda _: f"{marked}\n" if marked else "\n\n", card, count=1).rstrip("\n") + "\n"
    return card.rstrip("\n") + marked if marked else card


def _with_tag(card: str, *, present: bool) -> str:
    """Return a card whose metadata have the tag of chain attention, or do not have it."""
    parsed = ModelCard(card, ignore_metadata_errors=True)
    data = cast("ModelCardData", parsed.data)
    others = [tag for tag in data.tags or [] if tag != TAG]
    data.tags = [*others, TAG] if present else others or None
    return str(parsed)


def _title(model: nn.Module) -> str:
    return type(next(iter(parts_of(model)), model)).__name__
