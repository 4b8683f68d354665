"""Rectangular parts of the attention matrix, computed from queries and keys when they are needed.

Letters: ``B`` batch, ``H`` query heads, ``G`` key heads, ``T`` tokens, ``D`` key width, ``E`` value width, and
``N = B * H``.
"""

import math

import torch
from torch import Tensor

from hf_chainattn.masks import AttentionMask

# logits and logs of sums are kept in base 2; which of 2^x and e^x torch computes faster depends on the CPU
LOG2_E = math.log2(math.e)

_FLASH = "_scaled_dot_product_flash_attention_for_cpu"


class Workspace:
    """Memory that is reused from block to block. Fresh pages can cost more than the arithmetic of a block.

    Args:
        like: Gives dtype and device.
    """

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._memory: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """Return a contiguous tensor of this shape with any content; the last one of the name is overwritten.

        Ask for the largest first: a larger one than before is new memory.
        """
        size = math.prod(shape)
        if name not in self._memory or self._memory[name].numel() < size:
            self._memory[name] = self._like.new_empty(size)
        return self._memory[name][:size].view(shape)


class Tiles:
    """Logits and weights of parts of the attention matrix of every head.

    Args:
        query: ``[B, H, T, D]``, float32 or float64.
        key: ``[B, G, T, D]`` in the same dtype, ``G`` a divisor of ``H``.
        mask: Who sees whom.
        scale: Factor on the logits.
        softcap: Bounds the logits to ``softcap * tanh(logits / softcap)`` before bias and mask.

    Attributes:
        query: ``[N, T, D]``.
        key: ``[B * G, T, D]``.
        repeats: ``H / G``.
        space: Where tiles are written; the next tile overwrites the last.
    """

    def __init__(
        self, query: Tensor, key: Tensor, mask: AttentionMask, *, scale: float, softcap: float | None
    ) -> None:
        _, self.heads, tokens, width = query.shape
        self.repeats = self.heads // key.shape[1]
        self.query = query.reshape(-1, tokens, width)
        self.key = key.reshape(-1, tokens, width)
        self.mask, self.scale, self.softcap = mask, scale, softcap
        self.space = Workspace(query)

    def logits(self, rows: slice, columns: slice) -> Tensor:
        """Return the logits in base 2, ``[N, rows, columns]``, softcapped, with bias, ``-inf`` where hidden."""
        logits = self._products(rows, columns)
        if self.softcap is not None:
            logits.tanh_().mul_(self.softcap * LOG2_E)
        self.mask.apply_(self._by_head(logits), rows, columns, LOG2_E)
        return logits

    def weights(self, rows: slice, columns: slice, log_sum: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the attention weights of a tile ``[N, rows, columns]``, and the slope of the softcap there, if any.

        Args:
            rows: Which queries.
            columns: Which keys.
            log_sum: ``[N, T, 1]``, log in base 2 of the sum of exponentials of each row; ``inf`` makes the row 0.
        """
        logits, slope = self._products(rows, columns), None
        if self.softcap is not None:
            slope = 1 - logits.tanh_().square()
            logits.mul_(self.softcap * LOG2_E)
        self.mask.apply_(self._by_head(logits), rows, columns, LOG2_E)
        return logits.sub_(log_sum[:, rows]).exp2_(), slope

    def repeated_key(self, columns: slice) -> Tensor:
        """Return ``[N, columns, D]``, each key once for every query head that reads it."""
        part = self.key[:, columns]
        return part if self.repeats == 1 else part.repeat_interleave(self.repeats, dim=0)

    def can_fuse(self, value_width: int) -> bool:
        """Return whether ``fused_read`` can be used, for values of this width."""
        return (
            self.mask.plain
            and self.softcap is None
            and self.query.device.type == "cpu"
            and self.query.shape[-1] == value_width
            and hasattr(torch.ops.aten, _FLASH)
        )

    def fused_read(self, rows: slice, stop: int, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return ordinary attention of some rows to all keys before ``stop``, by PyTorch's fused CPU kernel.

        The public function returns no log of the sum, without which the result cannot be joined with other keys.

        Args:
            rows: Which queries, none before ``stop``.
            stop: One more than the last key.
            values: ``[N, T, E]``.

        Returns:
            The result ``[N, rows, E]``, and the log in base 2 of the sum of exponentials ``[N, rows, 1]``.
        """
        by_group = (-1, self.repeats)
        key = self.key[:, None, :stop].expand(-1, self.repeats, -1, -1)
        read, log_sum = getattr(torch.ops.aten, _FLASH)(
            self.query[:, rows].unflatten(0, by_group), key, values[:, :stop].unflatten(0, by_group), scale=self.scale
        )
        return read.flatten(0, 1), log_sum.flatten(0, 1).unsqueeze(-1).mul_(LOG2_E)

    def _by_head(self, tile: Tensor) -> Tensor:
        """Return a view ``[B, H, rows, columns]``."""
        return tile.unflatten(0, (-1, self.heads))

    def _products(self, rows: slice, columns: slice) -> Tensor:
        """Return query times key ``[N, rows, columns]`` as logits in base 2, or in units of the softcap."""
        query, key = self.query[:, rows], self.key[:, columns]
        heads, height, breadth = query.shape[0], query.shape[1], key.shape[1]
        if self.repeats > 1 and height > breadth:
            key = self.repeated_key(columns)
        elif self.repeats > 1:
            # the queries that share a key head stand below one another: no key is repeated
            query = query.reshape(key.shape[0], -1, query.shape[-1])
        products = self.space.take("products", query.shape[0], query.shape[1], breadth)
        factor = self.scale * (LOG2_E if self.softcap is None else 1 / self.softcap)
        torch.baddbmm(products, query, key.mT, beta=0, alpha=factor, out=products)
        return products.view(heads, height, breadth)
