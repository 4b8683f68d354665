"""The oracle: chain attention written down as its definition, checked against by everything faster."""

import torch
from torch import Tensor


def chain_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    gamma: float | Tensor,
    diagonal: str = "kept",
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    r"""Chain attention by one linear solve per head. Slow, short, and the oracle for every faster path.

    Let ``A`` be softmax attention, so each row of ``A`` sums to 1. Ordinary attention reads the tokens one hop away,
    ``A @ V``. Chain attention follows the hops on: after every hop the walk goes on with probability ``gamma``,

        Y = (1 - gamma) * A @ inverse(I - gamma * A_c) @ V,

    where ``A_c`` is ``A`` (``diagonal="kept"``) or ``A`` with a zero diagonal (``"removed"``). ``gamma = 0`` is
    ordinary attention.

    Letters: ``B`` batch, ``H`` heads, ``T`` tokens, ``D`` key width, ``E`` value width.

    Args:
        query: ``[B, H, T, D]``.
        key: ``[B, H, T, D]``. Repeat grouped key heads before the call.
        value: ``[B, H, T, E]``.
        gamma: Chance of one more hop, in ``[0, 1)``, or a tensor of them with shape ``[H]``. arXiv 2410.05565, Eq. 5.
        diagonal: ``"kept"`` or ``"removed"``.
        mask: Boolean, broadcastable to ``[B, H, T, T]``; True where query ``t`` sees key ``j``. ``None`` means the
            causal mask. A row without any True attends to nothing: its output is 0.
        bias: Added to the scaled logits, broadcastable to ``[B, H, T, T]``.
        scale: Factor on the logits. ``None`` means ``D ** -0.5``.

    Returns:
        ``[B, H, T, E]`` in the dtype of ``value``, solved in that dtype (float32 for half precision).

    Raises:
        ValueError: If ``gamma`` is outside ``[0, 1)`` or ``diagonal`` is unknown.
    """
    dtype = torch.promote_types(value.dtype, torch.float32)
    tokens = query.shape[-2]
    probability = torch.as_tensor(gamma, dtype=dtype, device=value.device).reshape(-1, 1, 1)
    if not bool(((probability >= 0) & (probability < 1)).all()):
        raise ValueError(f"gamma must be in [0, 1), got {gamma!r}: at 1 the walk never stops and I - A is singular.")
    if diagonal not in ("kept", "removed"):
        raise ValueError(f"diagonal must be 'kept' or 'removed', got {diagonal!r}.")
    if mask is None:
        mask = torch.ones(tokens, tokens, dtype=torch.bool, device=value.device).tril()
    logits = query.to(dtype) @ key.to(dtype).transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        logits = logits + bias.to(dtype)
    # softmax of a row of -inf is nan; such a row attends to nothing
    attention = torch.softmax(logits.masked_fill(~mask, -torch.inf), dim=-1).masked_fill(~mask, 0.0)
    inside = attention if diagonal == "kept" else attention - torch.diag_embed(attention.diagonal(dim1=-2, dim2=-1))
    identity = torch.eye(tokens, dtype=dtype, device=value.device)
    systems, rights = identity - probability * inside, (1 - probability) * value.to(dtype)
    # one at a time: with several threads torch's LU of a batch is wrong (github.com/pytorch/pytorch/issues/142815)
    heads = zip(systems.flatten(0, 1), rights.flatten(0, 1), strict=True)
    mixed = torch.stack([torch.linalg.solve(system, right) for system, right in heads]).view_as(rights)
    return (attention @ mixed).to(value.dtype)
