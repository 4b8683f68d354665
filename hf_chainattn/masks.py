"""What an attention mask says, read once and applied tile by tile, so that no ``T x T`` matrix has to be held."""

import copy
import numbers
from dataclasses import dataclass

import torch
from torch import Tensor

# rows of a given mask that are looked at together
_SCAN_ROWS = 512
# sizes of tiles are multiples of this, which matrix products like
_ALIGNED = 16
# forms of tiles that are remembered
_BANDS = 4


@dataclass(frozen=True)
class _Scan:
    """What one look at a given mask found.

    Args:
        hides: Some query does not see some key.
        triangular: No query sees a later key.
        exactly_causal: Every query sees itself and every earlier key, and no later one.
        first_key: For each query, the first key that it sees in any batch row and head.
        last_query: For each key, the last query that sees it in any batch row and head.
    """

    hides: bool
    triangular: bool
    exactly_causal: bool
    first_key: Tensor
    last_query: Tensor


class AttentionMask:
    """Who sees whom, and what is added to the logits.

    The sources intersect: a key is visible if every one of them shows it. ``attn_mask`` decides about order:

    | ``attn_mask`` | later keys |
    | --- | --- |
    | ``None`` | hidden if ``is_causal`` |
    | one row for all queries, ``[..., 1, T]`` | hidden if ``is_causal`` |
    | boolean ``[..., T, T]``, or additive and hiding something | as it says |
    | additive and hiding nothing: a bias | hidden if ``is_causal`` |

    Args:
        attn_mask: Boolean (True = visible) or floating point and added to the logits, broadcastable to
            ``[B, H, T, T]``. In a floating point mask, values at or below half of the most negative number of its
            dtype hide the key, as transformers writes them; any other value only moves a logit.
        key_padding_mask: ``[B, T]``, boolean or integer; True or 1 = visible, as a tokenizer's ``attention_mask``.
        segment_ids: ``[B, T]``, integer; tokens of different segments do not see one another.
        window: Tokens ``t`` and ``j`` see one another only if ``|t - j| < window``.
        is_causal: See the table.
        tokens: ``T``.

    Attributes:
        attn_mask: The given mask as ``[1 or B, 1 or H, 1 or T, 1 or T]``; ``None`` if it adds nothing to ``causal``.
        causal: Later keys are hidden whatever else is.
        triangular: No token sees a later one, so that the walk can be solved by substitution.
        plain: The mask is the causal mask and nothing else.
    """

    def __init__(
        self,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        window: int | None = None,
        *,
        is_causal: bool,
        tokens: int,
    ) -> None:
        self.tokens, self.window, self.segment_ids = tokens, window, segment_ids
        self.attn_mask = None if attn_mask is None else attn_mask[(None,) * (4 - attn_mask.ndim)]
        self.key_padding_mask = None if key_padding_mask is None else key_padding_mask != 0
        self.causal = is_causal
        self._bands: dict[tuple[int, int, int], Tensor] = {}
        scan = None
        if self.attn_mask is not None and self.attn_mask.shape[-2] == tokens:
            scan = _scan(self.attn_mask, tokens)
            self.causal = scan.triangular or (is_causal and self._is_bias() and not scan.hides)
            if scan.exactly_causal and not self._is_bias():
                self.attn_mask = None
        self.triangular = self.causal
        self.plain = self.causal and not self._hides() and self.attn_mask is None
        self._first_key, self._last_query = self._reach(scan) if self.triangular else (None, None)

    def _is_bias(self) -> bool:
        return self.attn_mask is not None and self.attn_mask.is_floating_point()

    def _hides(self) -> bool:
        return any(source is not None for source in (self.key_padding_mask, self.segment_ids, self.window))

    def _reach(self, scan: _Scan | None) -> tuple[list[int] | None, list[int] | None]:
        """Return the first key of every query and the last query of every key; ``None`` where nothing is gained."""
        first = last = None
        if scan is not None and scan.triangular and not scan.exactly_causal:
            first, last = scan.first_key, scan.last_query
        if self.segment_ids is not None:
            starts, ends = _segment_ends(self.segment_ids)
            first = starts if first is None else torch.maximum(first, starts)
            last = ends if last is None else torch.minimum(last, ends)
        if self.window is not None:
            places = torch.arange(self.tokens, device="cpu" if first is None else first.device)
            starts, ends = places - (self.window - 1), places + (self.window - 1)
            first = starts if first is None else torch.maximum(first, starts)
            last = ends if last is None else torch.minimum(last, ends)
        if first is None or last is None:
            return None, None
        return first.clamp(0).tolist(), last.clamp(max=self.tokens - 1).tolist()

    @property
    def local(self) -> bool:
        """Whether some keys are known to be out of reach for some queries, beside later ones."""
        return self._first_key is not None

    def first_key(self, start: int, stop: int) -> int:
        """Return a key before which no query from ``start`` to ``stop - 1`` sees any: the last such multiple of 16."""
        return 0 if self._first_key is None else min(start, *self._first_key[start:stop]) // _ALIGNED * _ALIGNED

    def query_stop(self, start: int, stop: int) -> int:
        """Return a query from which on no key from ``start`` to ``stop - 1`` is seen, at least ``stop``, likewise."""
        if self._last_query is None:
            return self.tokens
        last = max(stop - 1, *self._last_query[start:stop])
        return min((last // _ALIGNED + 1) * _ALIGNED, self.tokens)

    def apply_(self, logits: Tensor, rows: slice, columns: slice, unit: float = 1.0) -> None:
        """Add the bias to a tile of logits and write ``-inf`` where the key is hidden, in place.

        Args:
            logits: ``[B, H, rows, columns]``.
            rows: Which queries.
            columns: Which keys. In a causal mask they begin at or before the first query.
            unit: The logits are given times this number.
        """
        if self.attn_mask is not None:
            given = self.tile_of(self.attn_mask, rows, columns)
            if given.dtype == torch.bool:
                logits.masked_fill_(~given, -torch.inf)
            else:
                logits.add_(given, alpha=unit).masked_fill_(hidden_by(given), -torch.inf)
        if self.key_padding_mask is not None:
            logits.masked_fill_(~self.key_padding_mask[:, None, None, columns], -torch.inf)
        if self.segment_ids is not None:
            other = self.segment_ids[:, rows, None] != self.segment_ids[:, None, columns]
            logits.masked_fill_(other[:, None], -torch.inf)
        if self.window is not None:
            logits.add_(self._band(logits, rows, columns))
        elif self.causal and columns.stop > rows.start + 1:
            # only keys from the first query on can be later than a query
            tail = slice(rows.start, columns.stop)
            logits[..., rows.start - columns.start :].add_(self._band(logits, rows, tail))

    def whole(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return who is visible, and what is added where they are, ``[B, H, T, T]`` each: memory O(B H T^2).

        Args:
            like: ``[B, H, ...]``, gives dtype and device.
        """
        everything = slice(0, self.tokens)
        logits = like.new_zeros(*like.shape[:2], self.tokens, self.tokens)
        self.apply_(logits, everything, everything)
        visible = logits.detach() > -torch.inf
        return visible, torch.where(visible, logits, 0.0)

    def _band(self, logits: Tensor, rows: slice, columns: slice) -> Tensor:
        """Return ``-inf`` where order or window hides the key, else 0, ``[rows, columns]``; each form is made once."""
        if torch.compiler.is_compiling():
            # sizes may be symbols there, which cannot be looked up
            return self._new_band(logits, rows, columns)
        form = rows.stop - rows.start, columns.stop - columns.start, rows.start - columns.start
        if form not in self._bands:
            if len(self._bands) == _BANDS:
                self._bands.clear()
            self._bands[form] = self._new_band(logits, rows, columns)
        return self._bands[form]

    def _new_band(self, logits: Tensor, rows: slice, columns: slice) -> Tensor:
        # entry [i, j] belongs to a query that is i - j + offset places after its key
        size, offset = (rows.stop - rows.start, columns.stop - columns.start), rows.start - columns.start
        everywhere = logits.new_full(size, -torch.inf)
        if self.window is None:
            return everywhere.triu_(offset + 1)
        later = everywhere.triu(offset + (1 if self.causal else self.window))
        return later.add_(everywhere.tril_(offset - self.window))

    def of(self, rows: slice, heads: slice) -> "AttentionMask":
        """Return the mask of some batch rows and heads; nothing is read in again."""
        part = copy.copy(self)
        if self.attn_mask is not None:
            part.attn_mask = self.broadcast_of(self.attn_mask, rows, heads)
        for name in ("key_padding_mask", "segment_ids"):
            source = getattr(self, name)
            if source is not None and len(source) > 1:
                setattr(part, name, source[rows])
        return part

    @staticmethod
    def broadcast_of(full: Tensor, rows: slice, heads: slice) -> Tensor:
        """Return the part of ``[1 or B, 1 or H, ...]`` that some rows and heads broadcast against, a view."""
        full = full if full.shape[0] == 1 else full[rows]
        return full if full.shape[1] == 1 else full[:, heads]

    @staticmethod
    def tile_of(full: Tensor, rows: slice, columns: slice) -> Tensor:
        """Return the part of ``[.., 1 or T, 1 or T]`` that a tile broadcasts against."""
        full = full if full.shape[-2] == 1 else full[..., rows, :]
        return full if full.shape[-1] == 1 else full[..., columns]


def check_masks(
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    segment_ids: Tensor | None,
    window: int | None,
    *,
    batch: int,
    heads: int,
    tokens: int,
) -> None:
    """Raise unless dtypes and shapes of the sources of a mask fit.

    Raises:
        TypeError: If a mask is no tensor or has the wrong dtype, or ``window`` is no integer.
        ValueError: If a shape does not fit, or ``window`` is below 1.
    """
    sources = {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask, "segment_ids": segment_ids}
    for name, source in sources.items():
        if source is not None and not isinstance(source, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(source).__name__}.")
    if attn_mask is not None:
        full = (batch, heads, tokens, tokens)
        shape = tuple(attn_mask.shape)
        fits = all(given in (1, size) for given, size in zip(reversed(shape), reversed(full), strict=False))
        if not 2 <= len(shape) <= 4 or not fits:
            raise ValueError(f"attn_mask must be broadcastable to [B, H, T, T] = {list(full)}, got {list(shape)}.")
        if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
            raise TypeError(f"attn_mask must be boolean or floating point, got {attn_mask.dtype}.")
    for name, source in (("key_padding_mask", key_padding_mask), ("segment_ids", segment_ids)):
        if source is not None and (source.is_floating_point() or source.is_complex()):
            raise TypeError(f"{name} must be boolean or integer, got {source.dtype}.")
        if source is not None and source.shape != (batch, tokens):
            raise ValueError(f"{name} must have the shape [B, T] = {[batch, tokens]}, got {list(source.shape)}.")
    if window is not None and (isinstance(window, bool) or not isinstance(window, numbers.Integral | torch.SymInt)):
        raise TypeError(f"window must be an integer, got {window!r}.")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, the token itself, got {window!r}.")


def hidden_by(additive: Tensor) -> Tensor:
    """Return where an additive mask hides the key, rather than only lowers its logit."""
    return additive <= torch.finfo(additive.dtype).min / 2


def _scan(mask: Tensor, tokens: int) -> _Scan:
    """Look at a mask ``[.., .., T, 1 or T]`` once, some rows at a time."""
    first_key = torch.empty(tokens, dtype=torch.long, device=mask.device)
    last_query = torch.full((tokens,), -1, dtype=torch.long, device=mask.device)
    shown = torch.zeros((), dtype=torch.long, device=mask.device)
    later = torch.zeros((), dtype=torch.bool, device=mask.device)
    for start in range(0, tokens, _SCAN_ROWS):
        stop = min(start + _SCAN_ROWS, tokens)
        visible = mask[..., start:stop, :].expand(-1, -1, -1, tokens)
        visible = visible if visible.dtype == torch.bool else ~hidden_by(visible)
        shown += visible.count_nonzero()
        somewhere = visible.flatten(0, 1).any(0)
        later |= somewhere[:, start:].triu(1).any()
        # argmax gives the first True; a query that sees nothing counts as seeing only itself
        queries = torch.arange(start, stop, device=mask.device)
        first_key[start:stop] = torch.where(somewhere.any(1), somewhere.byte().argmax(1), queries)
        last_here = stop - 1 - somewhere.flip(0).byte().argmax(0)
        last_query = torch.where(somewhere.any(0), last_here, last_query)
    tiles = mask.shape[0] * mask.shape[1]
    count, triangular = int(shown), not bool(later)
    return _Scan(
        hides=count < tiles * tokens * tokens,
        triangular=triangular,
        exactly_causal=triangular and count == tiles * tokens * (tokens + 1) // 2,
        first_key=first_key,
        last_query=last_query,
    )


def _segment_ends(segment_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return, for each place, where its segment begins and ends at the farthest in any batch row, ``[T]`` each."""
    batch, tokens = segment_ids.shape
    # one number for each segment of each batch row
    offset = torch.arange(batch, device=segment_ids.device)[:, None]
    _, ranks = torch.unique(segment_ids, return_inverse=True)
    ranks = (ranks + offset * (int(ranks.max()) + 1)).flatten()
    places = torch.arange(tokens, device=segment_ids.device).repeat(batch)
    size = int(ranks.max()) + 1
    begins = torch.full((size,), tokens, device=ranks.device).scatter_reduce(0, ranks, places, "amin")
    ends = torch.full((size,), -1, device=ranks.device).scatter_reduce(0, ranks, places, "amax")
    return begins[ranks].view(batch, tokens).amin(0), ends[ranks].view(batch, tokens).amax(0)
