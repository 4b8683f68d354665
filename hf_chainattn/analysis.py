"""Where an output came from: the weights of its values, and how far the walk went for them.

For short sequences: everything here holds the ``[B, H, T, T]`` attention matrix in memory.
"""

import torch
from torch import Tensor

from hf_chainattn.arguments import check_shapes, gamma_and_halting
from hf_chainattn.config import check_diagonal
from hf_chainattn.dense import attention_matrix, system_matrix
from hf_chainattn.linalg import solve
from hf_chainattn.masks import AttentionMask, check_masks
from hf_chainattn.precision import without_autocast


@torch.no_grad()
def mixing_matrix(
    query: Tensor,
    key: Tensor,
    *,
    gamma: float | Tensor,
    diagonal: str = "kept",
    attn_mask: Tensor | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    r"""Return ``M = (1 - gamma) A (I - gamma A_c)^-1``, the weight of every value in every output: ``Y = M V``.

    It is to chain attention what the attention matrix is to ordinary attention: row ``t`` says which tokens the output
    at ``t`` was made of, however many hops away they are. From Eq. 5 of arXiv 2410.05565.

    Letters: ``B`` batch, ``H`` query heads, ``H_kv`` key heads (a divisor of ``H``), ``T`` tokens, ``D`` key width.

    Args:
        query: ``[B, H, T, D]``.
        key: ``[B, H_kv, T, D]``.
        gamma: Chance of one more hop, in ``[0, 1)``: a number, or a tensor of shape ``[H]`` or ``[1]``.
        diagonal: ``"kept"``: ``A_c = A``; ``"removed"``: ``A_c`` is ``A`` with a zero diagonal.
        attn_mask: As for ``chain_attention``: boolean (True = visible) or additive, broadcastable to ``[B, H, T, T]``.
            Padding is a mask of one row, ``[B, 1, 1, T]``.
        is_causal: As for ``chain_attention``.
        scale: Factor on the logits. ``None`` means ``D ** -0.5``.
        softcap: Bounds the logits to ``softcap * tanh(logits / softcap)`` before mask and bias.

    Returns:
        ``[B, H, T, T]``, float32, or float64 if an input is. No entry is negative. Rows sum to 1 with ``"kept"``, to
        between ``1 - gamma`` and 1 with ``"removed"``. The exceptions are a token that sees nothing, whose row is 0,
        and tokens that see such a token: a walk that goes on from there reads nothing. No gradient is recorded. Memory
        O(B H T^2), time O(B H T^3).

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If a value or shape does not fit.

    Example:
        >>> import torch
        >>> from hf_chainattn import mixing_matrix
        >>> query, key = torch.zeros(2, 1, 1, 3, 4).unbind(0)  # every token looks at all it sees alike
        >>> mixing_matrix(query, key, gamma=0.5)[0, 0]
        tensor([[1.0000, 0.0000, 0.0000],
                [0.6667, 0.3333, 0.0000],
                [0.5333, 0.2667, 0.2000]])
    """
    attention, hop, halting, triangular = _attention(
        query, key, gamma, diagonal, attn_mask, is_causal=is_causal, scale=scale, softcap=softcap
    )
    system = system_matrix(attention, hop, halting, kept=diagonal == "kept", triangular=triangular)
    if triangular:
        return torch.linalg.solve_triangular(system, halting * attention, upper=False, left=False)
    # the exact solution has no negative entry, an LU factorisation may leave one of the size of rounding
    return solve(system.mT, (halting * attention).mT).mT.clamp(min=0.0)


@torch.no_grad()
def hop_distribution(
    query: Tensor,
    key: Tensor,
    *,
    gamma: float | Tensor,
    max_moves: int,
    diagonal: str = "kept",
    attn_mask: Tensor | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    r"""Return how many moves from one token to another the walk made before its value was read, as shares of ``Y``.

    Not every hop leads elsewhere: a token that attends to itself stays. With the diagonal ``D`` of ``A`` and the rest
    ``A_s``, let ``A(z) = D + z A_s``. Then the coefficient of ``z^k`` in ``M(z)`` collects the walks with ``k`` moves,

        kept:     M(z) = (1 - gamma) A(z) (I - gamma A(z))^-1,
                  M_0 = (1 - gamma) R D,   M_k = (1 - gamma) R A_s (gamma R A_s)^(k-1) R,   R = (I - gamma D)^-1,
        removed:  M(z) = (1 - gamma) A(z) (I - gamma z A_s)^-1,
                  M_k = (1 - gamma) (D (gamma A_s)^k + A_s (gamma A_s)^(k-1)),   without the second term at k = 0,

    and its row sums, formed by products with vectors alone, are what is returned.

    Letters: ``B`` batch, ``H`` query heads, ``H_kv`` key heads (a divisor of ``H``), ``T`` tokens, ``D`` key width.

    Args:
        query: ``[B, H, T, D]``.
        key: ``[B, H_kv, T, D]``.
        gamma: Chance of one more hop, in ``[0, 1)``: a number, or a tensor of shape ``[H]`` or ``[1]``.
        max_moves: The largest number of moves to count, at least 0.
        diagonal: ``"kept"``: ``A_c = A``; ``"removed"``: ``A_c`` is ``A`` with a zero diagonal.
        attn_mask: As for ``chain_attention``: boolean (True = visible) or additive, broadcastable to ``[B, H, T, T]``.
        is_causal: As for ``chain_attention``.
        scale: Factor on the logits. ``None`` means ``D ** -0.5``.
        softcap: Bounds the logits to ``softcap * tanh(logits / softcap)`` before mask and bias.

    Returns:
        ``[B, H, T, max_moves + 1]``, float32, or float64 if an input is: entry ``k`` is the weight, in ``[0, 1]``,
        that values reached by exactly ``k`` moves have in the output. What is missing to 1 belongs to walks with more
        moves, at most ``gamma ** max_moves`` in sum; with ``"removed"`` also to the mass which that convention drops,
        and in both to walks that came to a token that sees nothing. Where no token sees a later one, there are at most
        ``T - 1`` moves. No gradient is recorded. Memory O(B H T^2), time O(B H T^2 (D + max_moves)).

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If a value or shape does not fit, or ``max_moves`` is below 0.

    Example:
        >>> import torch
        >>> from hf_chainattn import hop_distribution
        >>> query, key = torch.zeros(2, 1, 1, 3, 4).unbind(0)
        >>> chain = torch.tensor([[1, 0, 0], [1, 0, 0], [0, 1, 0]]).bool()  # each token looks at the one before it
        >>> hop_distribution(query, key, gamma=0.5, max_moves=2, attn_mask=chain)[0, 0]
        tensor([[1.0000, 0.0000, 0.0000],
                [0.0000, 1.0000, 0.0000],
                [0.0000, 0.5000, 0.5000]])
    """
    if isinstance(max_moves, bool) or not isinstance(max_moves, int):
        raise TypeError(f"max_moves must be an integer, got {max_moves!r}.")
    if max_moves < 0:
        raise ValueError(f"max_moves must be at least 0, got {max_moves!r}.")
    attention, hop, halting, _ = _attention(
        query, key, gamma, diagonal, attn_mask, is_causal=is_causal, scale=scale, softcap=softcap
    )
    own = attention.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    on_diagonal = torch.eye(attention.shape[-1], dtype=torch.bool, device=attention.device)
    elsewhere = attention.masked_fill(on_diagonal, 0.0)
    masses = _masses_kept if diagonal == "kept" else _masses_removed
    with without_autocast(query):
        return torch.cat(masses(own, elsewhere, hop, halting, max_moves), -1)


def _masses_kept(own: Tensor, elsewhere: Tensor, hop: Tensor, halting: Tensor, max_moves: int) -> list[Tensor]:
    """Return ``M_k 1`` for ``k`` up to ``max_moves``, ``[B, H, T, 1]`` each, from ``D 1`` and ``A_s``."""
    # 1 - gamma a_tt written as a sum of positive terms, which holds since rows of A sum to 1
    off_mass = elsewhere.sum(-1, keepdim=True)
    pivot = (halting + hop * off_mass).masked_fill((off_mass == 0) & (own == 0), 1.0)
    masses, after = [halting * own / pivot], 1 / pivot
    for move in range(max_moves):
        after = elsewhere @ after / pivot * (hop if move else 1.0)
        masses.append(halting * after)
    return masses


def _masses_removed(own: Tensor, elsewhere: Tensor, hop: Tensor, halting: Tensor, max_moves: int) -> list[Tensor]:
    """Return the same for the convention that takes the diagonal out of the inverse."""
    masses, after = [halting * own], torch.ones_like(own)
    for _ in range(max_moves):
        # only the first hop may stay: either it was the move, or the walk goes on from where it stayed
        moved = elsewhere @ after
        after = hop * moved
        masses.append(halting * (moved + own * after))
    return masses


def _attention(
    query: Tensor,
    key: Tensor,
    gamma: float | Tensor,
    diagonal: str,
    attn_mask: Tensor | None,
    *,
    is_causal: bool,
    scale: float | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Return ``A``, gamma and ``1 - gamma`` as ``[H, 1, 1]``, and whether no token sees a later one."""
    check_shapes(query, key, key)
    check_diagonal(diagonal)
    batch, heads, tokens, width = query.shape
    check_masks(attn_mask, None, None, None, batch=batch, heads=heads, tokens=tokens)
    mask = AttentionMask(attn_mask, is_causal=is_causal, tokens=tokens)
    hop, halting = (part.view(-1, 1, 1) for part in gamma_and_halting(gamma, query, key, key))
    with without_autocast(query):
        attention = attention_matrix(
            query.to(hop.dtype),
            key.to(hop.dtype).repeat_interleave(heads // key.shape[1], 1),
            mask,
            scale=width**-0.5 if scale is None else scale,
            softcap=softcap,
        )
    return attention, hop, halting, mask.triangular
