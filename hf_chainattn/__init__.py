"""Chain attention for transformers models: ``from_pretrained(..., attn_implementation="chain")`` after this import.

One layer follows references of any depth, ``Y = (1 - gamma) A (I - gamma A)^-1 V`` (arXiv 2410.05565).
"""

from typing import TYPE_CHECKING, Any

from hf_chainattn.analysis import hop_distribution, mixing_matrix
from hf_chainattn.api import chain_attention
from hf_chainattn.card import update_model_card
from hf_chainattn.config import ChainAttentionConfig
from hf_chainattn.decode import chain_decode_step
from hf_chainattn.errors import (
    AdapterError,
    ChainAttentionError,
    InexactSolveError,
    InexactSolveWarning,
    UnsupportedCacheError,
    UnsupportedModelError,
)
from hf_chainattn.export import save_with_code
from hf_chainattn.gates import ChainGate, gate_parameter_groups
from hf_chainattn.models import disable_chain_attention, enable_chain_attention
from hf_chainattn.plots import plot_hops, plot_mixing
from hf_chainattn.reference import chain_attention_reference
from hf_chainattn.registration import is_registered, register, unregister
from hf_chainattn.summary import gamma_by_layer
from hf_chainattn.walks import ChainWalk, chain_walks

if TYPE_CHECKING:
    from hf_chainattn.schedule import GammaSchedule

__all__ = [
    "AdapterError",
    "ChainAttentionConfig",
    "ChainAttentionError",
    "ChainGate",
    "ChainWalk",
    "GammaSchedule",
    "InexactSolveError",
    "InexactSolveWarning",
    "UnsupportedCacheError",
    "UnsupportedModelError",
    "chain_attention",
    "chain_attention_reference",
    "chain_decode_step",
    "chain_walks",
    "disable_chain_attention",
    "enable_chain_attention",
    "gamma_by_layer",
    "gate_parameter_groups",
    "hop_distribution",
    "is_registered",
    "mixing_matrix",
    "plot_hops",
    "plot_mixing",
    "register",
    "save_with_code",
    "unregister",
    "update_model_card",
]

register()


def __getattr__(name: str) -> Any:  # noqa: ANN401  the class
    # transformers imports PEFT, where it is installed, with everything that has to do with Trainer
    if name == "GammaSchedule":
        from hf_chainattn.schedule import GammaSchedule

        return GammaSchedule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
