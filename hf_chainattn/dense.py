"""Chain attention with the attention matrix held in memory: one softmax, one solve, one product."""

import torch
from torch import Tensor

from hf_chainattn.masks import MaskFacts


def dense_chain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    gamma: Tensor,
    diagonal: str,
    mask: MaskFacts,
    scale: float,
    softcap: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Return chain attention by solving ``(I - gamma A_c) U = (1 - gamma) V`` and reading out ``Y = A U``.

    Dropout acts on the read-out alone. Inside the solve it could remove a pivot (0 at p = .1, gamma = .9).

    Args:
        query: ``[B, H, T, D]``, float32 or float64.
        key: ``[B, H, T, D]``.
        value: ``[B, H, T, E]``.
        gamma: ``[H]`` or ``[1]``, in ``[0, 1)``.
        diagonal: ``"kept"`` or ``"removed"``.
        mask: Who sees whom.
        scale: Factor on the logits.
        softcap: Bounds the logits to ``softcap * tanh(logits / softcap)`` before bias and mask.
        dropout_p: Chance that an entry of the read-out matrix is dropped. Drawn from torch's global generator.

    Returns:
        ``[B, H, T, E]``. Time O(T^2 (D + E) + T^2 E), or O(T^3) if the mask is not triangular; memory O(B H T^2).
    """
    attention = _attention_matrix(query, key, mask, scale, softcap)
    gamma = gamma.reshape(-1, 1, 1)
    system = _system_matrix(attention, gamma, diagonal, mask)
    right = (1 - gamma) * value
    if mask.triangular:
        solution = torch.linalg.solve_triangular(system, right, upper=False)
    else:
        solution = torch.linalg.solve(system, right)
    read_out = torch.nn.functional.dropout(attention, dropout_p) if dropout_p > 0 else attention
    return read_out @ solution


def _attention_matrix(query: Tensor, key: Tensor, mask: MaskFacts, scale: float, softcap: float | None) -> Tensor:
    """Return softmax attention ``[B, H, T, T]``; exactly 0 where hidden, so that no hidden token enters a walk."""
    logits = query @ key.transpose(-2, -1) * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if mask.bias is not None:
        logits = logits + mask.bias
    if mask.visible is None:
        return torch.softmax(logits, dim=-1)
    # a finite fill keeps a fully hidden row free of nan; the second fill then makes it 0
    logits = logits.masked_fill(~mask.visible, torch.finfo(logits.dtype).min)
    return torch.softmax(logits, dim=-1).masked_fill(~mask.visible, 0.0)


def _system_matrix(attention: Tensor, gamma: Tensor, diagonal: str, mask: MaskFacts) -> Tensor:
    """Return ``I - gamma A_c`` as ``[B, H, T, T]``, with the diagonal formed without cancellation."""
    on_diagonal = torch.eye(attention.shape[-1], dtype=torch.bool, device=attention.device)
    off_diagonal = attention.masked_fill(on_diagonal, 0.0)
    isolated = None
    if mask.visible is not None:
        # a token that nobody sees leaves the system: what stands in padding cannot even change a pivot choice
        seen = mask.visible.any(dim=-2).unsqueeze(-1)
        off_diagonal = off_diagonal.masked_fill(~seen, 0.0)
        isolated = ~(mask.visible.any(dim=-1, keepdim=True) & seen)
    if diagonal == "removed":
        return (-gamma * off_diagonal).masked_fill(on_diagonal, 1.0)
    # 1 - gamma a_tt written as a sum of positive terms, which holds since rows of A sum to 1
    pivot = (1 - gamma) + gamma * off_diagonal.sum(dim=-1, keepdim=True)
    if isolated is not None:
        pivot = pivot.masked_fill(isolated, 1.0)
    return torch.where(on_diagonal, pivot, -gamma * off_diagonal)
