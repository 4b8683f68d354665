"""Ways from a folder with an adapter of PEFT to a model with it, from a checkpoint of ordinary attention."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, PreTrainedModel

IDS = torch.arange(5, 25)[None]
LORA = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "r": 4}


class Base:
    """Loads a checkpoint of ordinary attention, as a chain where settings are given."""

    def __init__(self, folder: str, settings: dict[str, Any] | None = None, **others: Any) -> None:
        self.folder = folder
        chain = {} if settings is None else {"attn_implementation": "chain", "chain_attention": settings}
        self.asked = chain | others

    def __call__(self, **others: Any) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(self.folder, **self.asked, **others)


def _as_another(model: Any, folder: str) -> Any:
    model.load_adapter(folder, "other")
    model.set_adapter("other")
    return model


def _as_default(model: Any, folder: str) -> Any:
    model.load_adapter(folder, "default")
    return model


def _natively(model: Any, folder: str) -> Any:
    model.load_adapter(folder)
    return model


def _beside(base: Base, folder: str) -> peft.PeftModel:
    """A model with an adapter of the same kind, untrained."""
    config = peft.PeftConfig.from_pretrained(folder)
    config.inference_mode = False
    return peft.get_peft_model(base(), LoraConfig(**LORA, modules_to_save=config.modules_to_save))


ROUTES: dict[str, Callable[[Base, str], Any]] = {
    "PeftModel.from_pretrained": lambda base, folder: peft.PeftModel.from_pretrained(base(), folder),
    "a config at hand": lambda base, folder: peft.PeftModel.from_pretrained(
        base(), folder, config=peft.PeftConfig.from_pretrained(folder)
    ),
    "a subfolder": lambda base, folder: peft.PeftModel.from_pretrained(
        base(), Path(folder).parent, subfolder=Path(folder).name
    ),
    "another adapter": lambda base, folder: _as_another(_beside(base, folder), folder),
    "an adapter that is there": lambda base, folder: _as_default(_beside(base, folder), folder),
    "AutoPeftModel": lambda base, folder: peft.AutoPeftModelForCausalLM.from_pretrained(folder, **base.asked),
    "a mixed model": lambda base, folder: peft.PeftMixedModel.from_pretrained(base(), folder),
    "transformers' load_adapter": lambda base, folder: _natively(base(), folder),
    "transformers' AutoModel": lambda base, folder: AutoModelForCausalLM.from_pretrained(folder, **base.asked),
}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits
