"""What an attention mask says: which keys a token sees, what is added to its logits, and whether order is kept."""

from typing import NamedTuple

import torch
from torch import Tensor


class MaskFacts(NamedTuple):
    """An attention mask taken apart.

    Args:
        visible: Boolean, broadcastable to ``[B, H, T, T]``; True where the query sees the key. ``None``: everything.
        bias: Floating point, broadcastable to ``[B, H, T, T]``, added to the logits. ``None``: nothing.
        triangular: No token sees a later one, so that the walk can be solved by substitution.
    """

    visible: Tensor | None
    bias: Tensor | None
    triangular: bool


def read_mask(attn_mask: Tensor | None, *, tokens: int, is_causal: bool, device: torch.device) -> MaskFacts:
    """Return what the mask argument of attention means.

    Args:
        attn_mask: ``None``, boolean (True = visible), or floating point and added to the logits, each broadcastable to
            ``[B, H, T, T]``. In a floating point mask, values at or below half of the most negative number of its
            dtype hide the key, as transformers writes them; any other value only lowers a logit.
        tokens: ``T``.
        is_causal: Whether ``None`` means the causal mask or no mask. A given mask alone decides who is seen.
        device: Where the causal mask is made.

    Raises:
        TypeError: If the mask is neither boolean nor floating point.
        ValueError: If its last two sizes are not ``T`` or 1.
    """
    if attn_mask is None:
        if not is_causal:
            return MaskFacts(None, None, triangular=False)
        return MaskFacts(torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril(), None, triangular=True)
    if attn_mask.ndim < 2 or any(size not in (1, tokens) for size in attn_mask.shape[-2:]):
        raise ValueError(
            f"attn_mask must be broadcastable to [B, H, T, T] with T = {tokens}, got shape {list(attn_mask.shape)}."
        )
    if attn_mask.dtype == torch.bool:
        visible, bias = attn_mask, None
    elif attn_mask.is_floating_point():
        visible = attn_mask > torch.finfo(attn_mask.dtype).min / 2
        bias = attn_mask.masked_fill(~visible, 0.0)
    else:
        raise TypeError(f"attn_mask must be boolean or floating point, got {attn_mask.dtype}.")
    visible = visible.expand(*visible.shape[:-2], tokens, tokens)
    return MaskFacts(visible, bias, triangular=not bool(visible.triu(1).any()))
