"""How noisy copies of one input are made: what the smoothed classifier averages over."""

import abc
from collections.abc import Iterator

import torch
from torch import Tensor

from hf_certify.noise import Stage, draw_noise


class Perturbation(abc.ABC):
    """A distribution of copies of one input, drawn on the CPU and written into rows of a batch.

    Attributes:
        base: `[*shape]`, a row that the model can take: the input itself. Its dtype and device are those of a batch.
    """

    base: Tensor

    @abc.abstractmethod
    def draw(self, n: int, *, seed: int, index: int, stage: Stage, start: int = 0) -> Iterator[Tensor]:
        """Yield what makes the copies number ``start .. n - 1``, in chunks `[draws, ...]` on the CPU.

        A copy must depend on ``(seed, index, stage)`` and its number alone.
        """

    @abc.abstractmethod
    def write(self, drawn: Tensor, rows: Tensor) -> None:
        """Fill ``rows`` `[draws, *shape]` with the copies that ``drawn`` `[draws, ...]` makes, both on one device."""


class GaussianNoise(Perturbation):
    """Copies ``x + sigma * noise``, noise standard normal.

    Args:
        x: `[*shape]` float32.
        sigma: Standard deviation, ``> 0``, in the units of ``x``.

    Example:
        >>> noise = GaussianNoise(torch.zeros(2), sigma=0.5)
        >>> [tuple(chunk.shape) for chunk in noise.draw(100, seed=0, index=0, stage=Stage.SELECTION)]
        [(64, 2), (36, 2)]
    """

    def __init__(self, x: Tensor, sigma: float) -> None:
        self.base = x
        self.sigma = sigma

    def draw(self, n: int, *, seed: int, index: int, stage: Stage, start: int = 0) -> Iterator[Tensor]:
        """Yield standard normal noise, see ``draw_noise``."""
        return draw_noise(tuple(self.base.shape), n, seed=seed, index=index, stage=stage, start=start)

    def write(self, drawn: Tensor, rows: Tensor) -> None:
        """Fill ``rows`` with ``x + sigma * drawn``."""
        torch.add(self.base, drawn, alpha=self.sigma, out=rows)
