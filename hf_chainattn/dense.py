"""Chain attention with the attention matrix held in memory: one softmax, one solve, one product."""

import torch
from torch import Tensor

from hf_chainattn.linalg import solve
from hf_chainattn.masks import AttentionMask, hidden_by
from hf_chainattn.precision import without_autocast


def dense_chain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gamma: Tensor,
    halting: Tensor,
    mask: AttentionMask,
    scale: float,
    softcap: float | None,
    *,
    kept: bool,
    dropout_p: float,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """Return chain attention by solving ``(I - gamma A_c) U = (1 - gamma) V`` and reading out ``Y = A U``.

    Made of differentiable operations: it can be differentiated any number of times.

    Args:
        query: ``[B, H, T, D]``, float32 or float64.
        key: ``[B, H, T, D]``.
        value: ``[B, H, T, E]``.
        gamma: ``[H]``, in ``[0, 1)``.
        halting: ``1 - gamma``, likewise.
        mask: Who sees whom.
        scale: Factor on the logits.
        softcap: Bounds the logits to ``softcap * tanh(logits / softcap)`` before bias and mask.
        kept: Whether the diagonal takes part in the walk.
        dropout_p: Chance that an entry of the read-out matrix falls. Inside the solve it could remove a pivot.
        generator: Draws what falls; ``None``: torch's own.

    Returns:
        ``Y`` and ``U``, ``[B, H, T, E]``. Time O(T^2 (D + E)), or O(T^3) if the mask is not triangular; memory
        O(B H T^2).
    """
    attention = attention_matrix(query, key, mask, scale=scale, softcap=softcap)
    hop, halt = gamma.view(-1, 1, 1), halting.view(-1, 1, 1)
    system = system_matrix(attention, hop, halt, kept=kept, triangular=mask.triangular)
    right = halt * value
    if mask.triangular:
        mixed = torch.linalg.solve_triangular(system, right, upper=False)
    else:
        mixed = solve(system, right)
        # what nobody sees was left out of the system, and still sees others
        unseen = (attention == 0).all(-2).unsqueeze(-1)
        mixed = torch.where(unseen, right + hop * (attention @ mixed), mixed)
    if dropout_p > 0:
        stays = torch.empty_like(attention).bernoulli_(1 - dropout_p, generator=generator)
        attention = attention * stays / (1 - dropout_p)
    return attention @ mixed, mixed


def attention_matrix(
    query: Tensor, key: Tensor, mask: AttentionMask, *, scale: float, softcap: float | None
) -> Tensor:
    """Return softmax attention ``[B, H, T, T]``; exactly 0 where hidden, so that no hidden token enters a walk."""
    logits = query @ key.transpose(-2, -1) * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    everything = slice(0, query.shape[-2])
    mask.apply_(logits, everything, everything)
    return softmax(logits)


def attention_weights(
    query: Tensor, key: Tensor, mask: Tensor | None, *, scale: float | None, softcap: float | None
) -> Tensor:
    """Return softmax attention of queries to any keys ``[B, H, C, K]``, for those who ask a model for it.

    Args:
        query: ``[B, H, C, D]``.
        key: ``[B, H_kv, K, D]``.
        mask: Boolean or additive, broadcastable to the result; ``None``: everything is visible.
        scale: Factor on the logits. ``None`` means ``D ** -0.5``.
        softcap: Bound on the logits, before the mask.

    Returns:
        In the dtype of ``query``; computed in float32 at least. A row that sees nothing is 0.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    with without_autocast(query):
        keys = key.to(dtype).repeat_interleave(query.shape[1] // key.shape[1], 1)
        logits = query.to(dtype) @ keys.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        if mask is not None and mask.dtype == torch.bool:
            logits = logits.masked_fill(~mask, -torch.inf)
        elif mask is not None:
            logits = (logits + mask).masked_fill(hidden_by(mask), -torch.inf)
        return softmax(logits).to(query.dtype)


def softmax(logits: Tensor) -> Tensor:
    """Return the softmax of the last dimension, 0 where every logit is ``-inf``; gradients are finite there too."""
    peak = logits.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(logits.dtype).min)
    weights = (logits - peak).exp()
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total > 0, total, 1.0)


def system_matrix(attention: Tensor, hop: Tensor, halt: Tensor, *, kept: bool, triangular: bool) -> Tensor:
    """Return ``I - gamma A_c`` as ``[B, H, T, T]``, with the diagonal formed without cancellation.

    Args:
        attention: ``[B, H, T, T]``, rows that sum to 1, or to 0.
        hop: Gamma, ``[H, 1, 1]``.
        halt: ``1 - gamma``, likewise.
        kept: Whether the diagonal takes part in the walk.
        triangular: Whether ``attention`` is lower triangular.
    """
    on_diagonal = torch.eye(attention.shape[-1], dtype=torch.bool, device=attention.device)
    off_diagonal = attention.masked_fill(on_diagonal, 0.0)
    isolated = (attention == 0).all(-1, keepdim=True)
    if not triangular:
        # a token that nobody sees leaves the system: what stands in padding cannot even change a pivot choice
        unseen = (attention == 0).all(-2).unsqueeze(-1)
        off_diagonal = off_diagonal.masked_fill(unseen, 0.0)
        isolated = isolated | unseen
    if not kept:
        return (-hop * off_diagonal).masked_fill(on_diagonal, 1.0)
    # 1 - gamma a_tt written as a sum of positive terms, which holds since rows of A sum to 1
    pivot = (halt + hop * off_diagonal.sum(dim=-1, keepdim=True)).masked_fill(isolated, 1.0)
    return torch.where(on_diagonal, pivot, -hop * off_diagonal)
