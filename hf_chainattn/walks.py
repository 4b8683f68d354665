"""The walks of a model: from a model and its inputs to the matrices that ``plot_mixing`` and ``plot_hops`` draw."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_chainattn.analysis import hop_distribution, mixing_matrix
from hf_chainattn.calls import Place, observe
from hf_chainattn.errors import UnsupportedCacheError
from hf_chainattn.models import dispatching_modules
from hf_chainattn.parts import uses_chain


@dataclass(frozen=True)
class ChainWalk:
    """Where the outputs of one attention module came from.

    Letters: ``B`` batch, ``H`` query heads, ``T`` tokens.

    Args:
        module: Name of the module in the model, as in ``model.get_submodule(name)``.
        layer: Number of the layer, from 0.
        gamma: ``[H]``, chance of one more hop; 0 in a layer that is ordinary.
        mixing: ``[B, H, T, T]``, see ``mixing_matrix``. With gamma 0 it is the attention matrix.
        moves: ``[B, H, T, max_moves + 1]``, see ``hop_distribution``.
    """

    module: str
    layer: int
    gamma: Tensor
    mixing: Tensor
    moves: Tensor


@torch.no_grad()
def chain_walks(model: nn.Module, inputs: Mapping[str, Any], *, max_moves: int = 16) -> list[ChainWalk]:
    """Return the walks of every attention module of a model, in the order in which ``model(**inputs)`` calls them.

    The model runs once, and each matrix is computed from the very queries, keys, mask, bias, scale and gamma that its
    attention uses. So padding, windows, grouped heads, gates and settings of layers and heads are in it, and
    ``mixing @ values`` is what the module's heads return. Dropout is not; call ``model.eval()`` first.

    Layers that are ordinary by their settings are among the results, with gamma 0; cross-attention, and parts of the
    model with another attention implementation, are not.

    Args:
        model: A model with chain attention, or a module around one. It is left as it was.
        inputs: What the model is called with, as a tokenizer returns it. Not with a cache that holds something.
        max_moves: The largest number of moves to count, at least 0.

    Returns:
        A ``ChainWalk`` for each call of an attention module, on the device of the model, in float32, or float64 for a
        float64 model. Memory O(B H T (T + max_moves)) for each of them, time O(B H T^2 (T + max_moves)).

    Raises:
        TypeError: If ``model`` is no module, ``inputs`` no mapping or ``max_moves`` no integer.
        UnsupportedCacheError: If the inputs continue cached tokens: of those there are no queries any more.
        ValueError: If no part of the model uses chain attention, or ``max_moves`` is below 0.

    Example:
        >>> import torch
        >>> from transformers import AutoModelForCausalLM, GPT2Config
        >>> from hf_chainattn import chain_walks, enable_chain_attention
        >>> config = GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=11, bos_token_id=1, eos_token_id=2)
        >>> model = enable_chain_attention(AutoModelForCausalLM.from_config(config), layers=[1]).eval()
        >>> for walk in chain_walks(model, {"input_ids": torch.arange(5)[None]}):
        ...     print(walk.module, walk.gamma, list(walk.mixing.shape))
        transformer.h.0.attn tensor([0., 0.]) [1, 2, 5, 5]
        transformer.h.1.attn tensor([0.9000, 0.9000]) [1, 2, 5, 5]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module of torch, got {type(model).__name__}.")
    if not isinstance(inputs, Mapping):
        raise TypeError(f"inputs must be what the model is called with, by name, got {type(inputs).__name__}.")
    names = {
        module: name
        for name, module in dispatching_modules(model)
        if (config := getattr(module, "config", None)) is not None and uses_chain(config)
    }
    if not names:
        raise ValueError("chain_walks needs a model with attn_implementation='chain'.")
    walks: list[ChainWalk] = []

    def add(module: nn.Module, place: Place, *attended: Any, **settings: Any) -> None:
        walks.append(_walk(names[module], place.number, *attended, max_moves=max_moves, **settings))

    try:
        for module in names:
            observe(module, add)
        # an observer inside a compiled graph would see no numbers
        with torch.compiler.set_stance("force_eager"):
            model(**inputs)
    finally:
        for module in names:
            observe(module, None)
    return walks


def _walk(
    name: str,
    layer: int,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    *,
    max_moves: int,
    gamma: float | Tensor,
    **settings: Any,
) -> ChainWalk:
    if query.shape[2] != key.shape[2]:
        raise UnsupportedCacheError(
            f"chain_walks needs all tokens at once, got {query.shape[2]} queries and {key.shape[2]} keys: call it "
            "without past_key_values."
        )
    given = {"gamma": gamma, "attn_mask": mask, "is_causal": False, **settings}
    mixing = mixing_matrix(query, key, **given)
    moves = hop_distribution(query, key, max_moves=max_moves, **given)
    of_heads = torch.as_tensor(gamma, dtype=mixing.dtype, device=mixing.device).reshape(-1).expand(query.shape[1])
    return ChainWalk(name, layer, of_heads, mixing, moves)
