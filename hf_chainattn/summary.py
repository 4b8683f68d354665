"""Which layers of a model chain, and with which gamma: for people, for the log and for model cards."""

import re
from typing import NamedTuple

from torch import nn

from hf_chainattn.calls import place_of
from hf_chainattn.config import ChainAttentionConfig
from hf_chainattn.gates import gate_of, original_of
from hf_chainattn.models import dispatching_modules, is_cross_attention


def gamma_by_layer(model: nn.Module) -> dict[str, float | tuple[float, ...]]:
    """Return the gamma of each attention layer of a model, by the name of its module.

    Args:
        model: Any model, with chain attention or without, or a module around one.

    Returns:
        One number for a layer, or one for each head where they have their own. 0.0 stands for ordinary attention:
        cross-attention, encoders and towers that were not asked for, layers that ``layers`` leaves out. A learned
        gamma is given as it is now. Attention that never looks at transformers' attention interface is not listed.

    Example:
        >>> from transformers import AutoModelForCausalLM, GPT2Config
        >>> from hf_chainattn import enable_chain_attention, gamma_by_layer
        >>> config = GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=11, bos_token_id=1, eos_token_id=2)
        >>> model = enable_chain_attention(AutoModelForCausalLM.from_config(config), gamma=0.9, layers=[1])
        >>> gamma_by_layer(model)
        {'transformer.h.0.attn': 0.0, 'transformer.h.1.attn': 0.9}
    """
    return {name: _gamma_of(name, module) for name, module in dispatching_modules(model)}


class LayerGroup(NamedTuple):
    """Attention layers of one kind.

    Args:
        name: Of their modules, with a star for what differs.
        layers: How many.
        gammas: All that occur in them, sorted; ``(0.0,)`` for ordinary attention.
        learned: Whether gamma is a parameter.
        diagonal: Of their chain, see ``ChainAttentionConfig``.
    """

    name: str
    layers: int
    gammas: tuple[float, ...]
    learned: bool
    diagonal: str

    @property
    def gamma(self) -> str:
        """What gamma is, in words."""
        if self.gammas == (0.0,):
            return "ordinary attention"
        low, high = f"{self.gammas[0]:.4g}", f"{self.gammas[-1]:.4g}"
        return f"gamma {low if low == high else f'{low} to {high}'}" + (" (learned)" if self.learned else "")


def layer_groups(model: nn.Module) -> list[LayerGroup]:
    """Return the attention layers of a model, those alike together, in the order of the model."""
    found: dict[tuple[str, bool, bool, str], list[float | tuple[float, ...]]] = {}
    for name, module in dispatching_modules(model):
        gamma, stored = _gamma_of(name, module), getattr(getattr(module, "config", None), "chain_attention", None)
        diagonal = ChainAttentionConfig.from_value(stored).diagonal
        key = re.sub(r"\d+", "*", name), gamma != 0.0, gate_of(module) is not None, diagonal
        found.setdefault(key, []).append(gamma)
    groups = []
    for (name, _, learned, how), gammas in found.items():
        values = {value for gamma in gammas for value in (gamma if isinstance(gamma, tuple) else (gamma,))}
        groups.append(LayerGroup(name, len(gammas), tuple(sorted(values)), learned, how))
    return groups


def _gamma_of(name: str, module: nn.Module) -> float | tuple[float, ...]:
    place, gate = place_of(module), gate_of(module)
    if place is None or is_cross_attention(name):
        return 0.0
    if gate is not None:
        learned = gate()
        # a model that is being built has no values yet
        values = original_of(gate).start if learned.is_meta else tuple(learned.tolist())
        return values if len(values) > 1 else values[0]
    settings = ChainAttentionConfig.from_value(getattr(module.config, "chain_attention", None))
    return settings.of_layer(place.number, in_encoder=place.in_encoder)
