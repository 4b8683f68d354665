"""Chain attention of new tokens from a cache: keys as ever, and mixed values ``U`` in the place of plain values."""

import torch
from torch import Tensor

from hf_chainattn.arguments import check_shapes, check_tensors, gamma_and_halting, work_dtype
from hf_chainattn.config import check_diagonal, check_gamma
from hf_chainattn.dense import softmax
from hf_chainattn.linalg import solve
from hf_chainattn.masks import hidden_by
from hf_chainattn.precision import without_autocast


def chain_decode_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_u: Tensor,
    *,
    gamma: float | Tensor,
    diagonal: str = "kept",
    attn_mask: Tensor | None = None,
    softcap: float | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Chain attention of ``C`` new tokens that continue ``S`` past ones, and the ``U`` to remember of them.

    ``Y = A U`` makes chain attention ordinary attention with mixed values ``U``, and no later token changes the ``U``
    of an earlier one. So a cache of keys and ``U`` is all that a walk needs in order to go on. It is Eq. 7 of arXiv
    2410.05565, with the columns of ``A`` split into past ``p`` and new ``n``:

        R = A_np U_past,    (I - gamma A_c,nn) U_new = (1 - gamma) V_new + gamma R,    Y = R + A_nn U_new.

    Letters: ``B`` batch, ``H`` query heads, ``H_kv`` key heads (a divisor of ``H``), ``D`` key width, ``E`` value
    width. To continue, append ``key`` to ``past_key`` and ``U_new`` to ``past_u``. A prompt starts with ``S = 0``, or
    with ``chain_attention(..., return_u=True)``, which needs no ``[B, H, S, S]`` matrix.

    Args:
        query: ``[B, H, C, D]``, of the new tokens.
        key: ``[B, H_kv, C, D]``, likewise.
        value: ``[B, H_kv, C, E]``, likewise, plain.
        past_key: ``[B, H_kv, S, D]``, finite also where it is hidden.
        past_u: ``[B, H, S, E]``: ``U`` has a row for every **query** head. Plain values in its place give a wrong
            result without an error if ``H = H_kv``, since nothing tells them apart; else the shape gives them away.
        gamma: Chance of one more hop, in ``[0, 1)``: a number, or a tensor of shape ``[H]`` or ``[1]``, which may
            require gradients. Tensor values are not checked, so that no device is waited for.
        diagonal: ``"kept"``: ``A_c = A``; ``"removed"``: ``A_c`` is ``A`` with a zero diagonal.
        attn_mask: Boolean (True = visible) or additive, broadcastable to ``[B, H, C, S + C]``, read as by
            ``chain_attention``: ``-inf``, and anything at or below half of the most negative number of its dtype,
            hides the key; a token that sees nothing gives 0. Past tokens do not see new ones whatever it says. Later
            new tokens are hidden by ``None``, by one row for all queries, and by an additive mask that hides nothing,
            which is a bias; any other mask decides this alone.
        softcap: Bounds the logits to ``softcap * tanh(logits / softcap)`` before mask and bias.
        scale: Factor on the logits. ``None`` means ``D ** -0.5``.

    Returns:
        ``Y`` and ``U_new``, ``[B, H, C, E]`` in the dtype of ``value``. Computed in float32, in float64 if one of
        ``query``, ``key`` and ``value`` is, under autocast as well. The past may have any floating dtype; keeping
        ``U`` in bfloat16 costs about the accuracy that keeping ``V`` in it costs ordinary attention. Differentiable
        any number of times. Time O(B H C (S + C) (D + E)), O(B H C^3) more if a new token sees a later one; memory
        O(B H C (S + C)), and a copy of a past in another dtype. A mask for ``C > 1`` is looked at, which waits for
        the device.

    Raises:
        TypeError: If a tensor is not floating point, or ``attn_mask`` neither that nor boolean.
        ValueError: If a value or shape does not fit, such as a ``past_u`` with one row for each key head.
        UnsupportedCacheError: If there are more or fewer keys than queries, for instance because the past is among
            them. A ``ValueError`` too.

    Example:
        >>> import torch
        >>> from hf_chainattn import chain_decode_step
        >>> query, key, value = torch.randn(3, 1, 2, 5, 8).unbind(0)
        >>> past_key, past_u = key[:, :, :0], value[:, :, :0]
        >>> for t in range(5):
        ...     new = [tensor[:, :, t : t + 1] for tensor in (query, key, value)]
        ...     output, u = chain_decode_step(*new, past_key, past_u, gamma=0.9)
        ...     past_key, past_u = torch.cat([past_key, new[1]], 2), torch.cat([past_u, u], 2)
        >>> output.shape, past_u.shape
        (torch.Size([1, 2, 1, 8]), torch.Size([1, 2, 5, 8]))
    """
    check_shapes(query, key, value)
    check_diagonal(diagonal)
    _check_past(query, key, value, past_key, past_u)
    _check_mask(attn_mask, query, past_key.shape[2])
    hop, halting = _rates(gamma, query, key, value)
    dtype = work_dtype(query, key, value)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    with without_autocast(query):
        work = [tensor.to(dtype) for tensor in (query, key, value, past_key, past_u)]
        work[0] = work[0] * scale
        logits = torch.cat([_products(work[0], work[3]), _products(work[0], work[1])], -1)
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        attention, triangular = _attention(logits, attn_mask, None)
        kept = diagonal == "kept"
        read, u = _solve(attention, work[2], work[4], None, hop, halting, kept=kept, triangular=triangular)
    return read.to(value.dtype), u.to(value.dtype)


def decode_from_memory(
    query: Tensor,
    key: Tensor,
    values: Tensor,
    places: Tensor | None,
    *,
    gamma: float | Tensor,
    diagonal: str,
    attn_mask: Tensor,
    softcap: float | None,
    scale: float | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """Return what ``chain_decode_step`` returns, from a cache that holds past and new tokens already.

    Args:
        query: ``[B, H, C, D]``, of the new tokens.
        key: ``[B, H_kv, K, D]``, of past and new tokens, and of places not used yet.
        values: ``[B, H, K, E]``, in the same places: ``U`` of the past ones, plain values of the new ones.
        places: Where the new tokens are, ``[C]``; ``None``: at the end.
        gamma: As for ``chain_decode_step``, as the next.
        diagonal: ``"kept"`` or ``"removed"``.
        attn_mask: Broadcastable to ``[B, H, C, K]``; it hides places that are not used, too.
        softcap: As for ``chain_decode_step``, as the next.
        scale: Factor on the logits.
        dropout_p: Dropout of the read-out.
    """
    rows = query.shape[2]
    hop, halting = _rates(gamma, query, key, values)
    dtype = work_dtype(query, key, values)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    with without_autocast(query):
        work = [tensor.to(dtype) for tensor in (query, key, values)]
        logits = _products(work[0] * scale, work[1])
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        attention, triangular = _attention(logits, attn_mask, places)
        past, new = work[2], work[2][:, :, -rows:]
        if places is None:
            past = past[:, :, : past.shape[2] - rows]
        else:
            new = past.index_select(2, places)
        kept = diagonal == "kept"
        read, u = _solve(attention, new, past, places, hop, halting, kept=kept, triangular=triangular)
        if dropout_p > 0:
            to_past, to_new = _split(torch.dropout(attention, dropout_p, train=True), places, rows)
            read = to_past @ past + to_new @ u
    return read.to(values.dtype), u.to(values.dtype)


def _check_past(query: Tensor, key: Tensor, value: Tensor, past_key: Tensor, past_u: Tensor) -> None:
    """Raise unless the past fits the new tokens."""
    check_tensors(past_key=past_key, past_u=past_u)
    batch, heads = query.shape[:2]
    past = past_key.shape[2]
    if past_key.shape != (*key.shape[:2], past, key.shape[3]):
        raise ValueError(
            f"past_key must have the shape [B, H_kv, S, D] = {[*key.shape[:2], 'S', key.shape[3]]}, as key apart from "
            f"S, got {list(past_key.shape)}."
        )
    needed = [batch, heads, past, value.shape[3]]
    if list(past_u.shape) == needed:
        return
    if past_u.shape[1] == key.shape[1] != heads:
        raise ValueError(
            f"past_u must have the shape [B, H, S, E] = {needed}, got {list(past_u.shape)}: U is per query head, and "
            "these look like plain cached values of the key heads, from which a walk cannot be continued. Use the U "
            "that chain_decode_step or chain_attention(..., return_u=True) returned."
        )
    raise ValueError(
        f"past_u must have the shape [B, H, S, E] = {needed}, with U per query head and S as in past_key, got "
        f"{list(past_u.shape)}."
    )


def _check_mask(attn_mask: Tensor | None, query: Tensor, past: int) -> None:
    """Raise unless ``attn_mask`` has a fit dtype and broadcasts to ``[B, H, C, S + C]``."""
    if attn_mask is None:
        return
    if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise TypeError(f"attn_mask must be boolean or floating point, got {attn_mask.dtype}.")
    full = (*query.shape[:3], past + query.shape[2])
    sizes = list(zip(reversed(attn_mask.shape), reversed(full), strict=False))
    if not 2 <= attn_mask.ndim <= 4 or any(size not in (1, most) for size, most in sizes):
        raise ValueError(
            f"attn_mask must be broadcastable to [B, H, C, S + C] = {list(full)}, the new tokens as rows and past and "
            f"new ones as columns, got shape {list(attn_mask.shape)}."
        )


def _rates(gamma: float | Tensor, query: Tensor, key: Tensor, value: Tensor) -> tuple[float | Tensor, float | Tensor]:
    """Return gamma and ``1 - gamma``: numbers for a number, which spares two operations a token, or ``[H, 1, 1]``."""
    if not isinstance(gamma, Tensor):
        check_gamma(gamma)
        return gamma, 1.0 - gamma
    hop, halting = gamma_and_halting(gamma, query, key, value)
    return hop.view(-1, 1, 1), halting.view(-1, 1, 1)


def _products(query: Tensor, key: Tensor) -> Tensor:
    """Return query times key ``[B, H, C, keys]``, without repeating the keys of grouped heads."""
    batch, heads, rows, width = query.shape
    # the query heads that share a key head stand below one another
    below = query.reshape(batch, key.shape[1], heads // key.shape[1] * rows, width)
    return (below @ key.transpose(-2, -1)).view(batch, heads, rows, key.shape[2])


def _attention(logits: Tensor, attn_mask: Tensor | None, places: Tensor | None) -> tuple[Tensor, bool]:
    """Return attention from logits ``[B, H, C, S + C]``, 0 where hidden, and whether no token sees a later one.

    Args:
        logits: Of past and new tokens.
        attn_mask: Broadcastable to them; needed with ``places``.
        places: Where the new tokens are among the columns, ``[C]``; ``None``: at the end.
    """
    rows, columns = logits.shape[-2:]
    if attn_mask is None:
        # every token sees itself: no row is empty, and the fused softmax will do
        return torch.softmax(_hide_later_(logits), -1), True
    if rows == 1 and attn_mask.dtype == torch.bool and not torch.is_grad_enabled():
        return _attention_of_one_token(logits, attn_mask), True
    bias = attn_mask.is_floating_point()
    hidden = hidden_by(attn_mask) if bias else ~attn_mask
    if bias:
        logits = logits + attn_mask.to(logits.dtype)
    logits = logits.masked_fill(hidden, -torch.inf)
    # one query has no later one: nothing is looked at, and no device waited for
    if rows == 1 and not torch.is_grad_enabled():
        # nan where everything is hidden; its gradient would be nan too
        return torch.softmax(logits, -1).masked_fill_(hidden, 0.0), True
    if rows == 1:
        return softmax(logits), True
    if places is None and (hidden.shape[-2] == 1 or (bias and not bool(hidden.any()))):
        return softmax(_hide_later_(logits)), True
    _, among_new = _split(hidden.expand(*hidden.shape[:-1], columns), places, rows)
    return softmax(logits), not bool((~among_new).triu(1).any())


def _attention_of_one_token(logits: Tensor, visible: Tensor) -> Tensor:
    """Return attention from logits ``[B, H, 1, columns]``, as ``masked_fill`` and ``softmax`` give it, but sooner.

    Filling goes element by element, on one core. So it is done in the mask, which has no heads, with a number that is
    finite: the softmax of a token that sees nothing is then uniform, no nan, and is set to 0 by a product.
    """
    lowest = torch.finfo(logits.dtype).min / 2
    bias = torch.full(visible.shape, lowest, dtype=logits.dtype, device=logits.device).masked_fill_(visible, 0.0)
    return torch.softmax(logits + bias, -1).mul_(visible.any(-1, keepdim=True))


def _split(matrix: Tensor, places: Tensor | None, rows: int) -> tuple[Tensor, Tensor]:
    """Return the columns of past tokens and those of new ones; the first with 0 for the new where they have places."""
    if places is None:
        past, new = matrix.split([matrix.shape[-1] - rows, rows], -1)
        return past, new
    return matrix.index_fill(-1, places, 0), matrix.index_select(-1, places)


def _hide_later_(logits: Tensor) -> Tensor:
    """Write ``-inf`` into logits ``[B, H, C, S + C]`` where a new token would see a later one, and return them."""
    rows, columns = logits.shape[-2:]
    if rows > 1:
        later = torch.ones(rows, rows, dtype=torch.bool, device=logits.device).triu(1)
        logits[..., columns - rows :].masked_fill_(later, -torch.inf)
    return logits


def _solve(
    attention: Tensor,
    value: Tensor,
    past_u: Tensor,
    places: Tensor | None,
    hop: float | Tensor,
    halting: float | Tensor,
    *,
    kept: bool,
    triangular: bool,
) -> tuple[Tensor, Tensor]:
    """Return ``Y`` and ``U_new`` from attention ``[B, H, C, S + C]`` to past and new tokens.

    Args:
        attention: ``[B, H, C, columns]``.
        value: Plain, of the new tokens, ``[B, H_kv or H, C, E]``.
        past_u: ``[B, H, S, E]``, or with ``places`` all that is in memory, ``[B, H, columns, E]``.
        places: Where the new tokens are among the columns, ``[C]``; ``None``: at the end.
        hop: Gamma.
        halting: ``1 - gamma``.
        kept: Whether the diagonal takes part in the walk.
        triangular: Whether no new token sees a later one.
    """
    rows = attention.shape[-2]
    to_past, to_new = _split(attention, places, rows)
    read = to_past @ past_u
    if value.shape[1] != attention.shape[1]:
        value = value.repeat_interleave(attention.shape[1] // value.shape[1], 1)
    right = halting * value + hop * read
    off_mass = to_past.sum(-1, keepdim=True)
    if rows == 1:
        # attention of the token to itself is a number, and nothing has to be solved
        u = right / _pivot(off_mass, to_new, hop, halting) if kept else right
        return read + to_new * u, u
    on_diagonal = torch.eye(rows, dtype=torch.bool, device=attention.device)
    elsewhere = to_new.masked_fill(on_diagonal, 0.0)
    pivot = torch.ones_like(off_mass)
    if kept:
        own = to_new.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
        pivot = _pivot(off_mass + elsewhere.sum(-1, keepdim=True), own, hop, halting)
    system = torch.where(on_diagonal, pivot, -hop * elsewhere)
    if triangular:
        # row-major operands make this twice as fast as solving from the left
        u = torch.linalg.solve_triangular(system.mT, right.mT, upper=True, left=False).mT
    else:
        u = solve(system, right)
    return read + to_new @ u, u


def _pivot(off_mass: Tensor, own: Tensor, hop: float | Tensor, halting: float | Tensor) -> Tensor:
    """Return ``1 - gamma a_tt`` as a sum of positive terms, which holds since rows of ``A`` sum to 1.

    A token that sees nothing has a pivot of 1, and no walk.
    """
    return (halting + hop * off_mass).masked_fill((off_mass == 0) & (own == 0), 1.0)
