"""Gaussian noise that depends only on (seed, input, stage, draw): not on batch size, draw count or input order.

Every block of 4,096 draws has its own Mersenne Twister, whose whole state comes from NumPy's ``SeedSequence``. Within
a block the draws are made in order, in chunks of exactly 64.
"""

import enum
import secrets
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from hf_certify.config import MAX_SEED

BLOCK_DRAWS = 4096
CHUNK_DRAWS = 64

# part of every substream's key: raise it whenever the mapping from key to noise changes
NOISE_SCHEMA = 1

# torch's serialised Mersenne Twister: seed (8 bytes), left and seeded (4 + 4), next (8), then 624 words of 8 bytes
_STATE_BYTES = 5056
_WORDS = 624
_WORDS_AT = 24


class Stage(enum.IntEnum):
    """What a sample is used for; samples of different stages are independent."""

    SELECTION = 0
    ESTIMATION = 1
    PREDICTION = 2
    ATTACK = 3


def require_resolution(sigma: float, largest: float) -> None:
    """Raise unless float32 keeps the noise when it is added to values of magnitude up to ``largest``.

    Neighbours of a float32 value ``x`` are at most ``2**-23 * |x|`` apart, so the rule leaves at least 2,048 of them
    in one standard deviation. The floor of 1 under ``largest`` is for what a model adds to its input, such as biases.

    Raises:
        ValueError: If ``sigma < 2**-12 * max(1, largest)``.
    """
    least = 2**-12 * max(1.0, largest)
    if sigma < least:
        raise ValueError(
            f"sigma must be at least {least:.4g} for values up to {largest:.4g}, got {sigma!r}: float32 would round "
            f"the noise away; rescale x."
        )


def fresh_seed() -> int:
    """Return 128 bits from the operating system, in ``[0, 2**128)``."""
    return secrets.randbelow(MAX_SEED)


def draw_noise(
    shape: tuple[int, ...], n: int, *, seed: int, index: int, stage: Stage, start: int = 0
) -> Iterator[Tensor]:
    """Yield standard normal noise for draws ``start .. n - 1`` in order, at most 64 at a time.

    A draw is the same whatever ``n`` and ``start`` are. All chunks share one buffer: use one before asking for the
    next.

    Args:
        shape: `[*shape]` of one input, at least one element.
        n: Number after the last draw, ``>= 1``.
        seed: Root of all noise, in ``[0, 2**128)``.
        index: Which input, ``>= 0``.
        stage: Which sample of that input.
        start: First draw, ``>= 0``. Those before it in its block of 4,096 are made and thrown away.

    Yields:
        `[draws, *shape]` float32 on the CPU, ``1 <= draws <= 64``. The buffer is overwritten by the next chunk.

    Example:
        >>> chunks = draw_noise((2,), 100, seed=0, index=0, stage=Stage.SELECTION)
        >>> [tuple(chunk.shape) for chunk in chunks]
        [(64, 2), (36, 2)]
    """
    chunk = torch.empty((CHUNK_DRAWS, *shape))
    generator = torch.Generator()
    for first in range(start // BLOCK_DRAWS * BLOCK_DRAWS, n, CHUNK_DRAWS):
        block, offset = divmod(first, BLOCK_DRAWS)
        if offset == 0:
            _install_substream(generator, (NOISE_SCHEMA, index, stage, block), seed)
        # always the whole chunk: normal_ has no prefix property, so a shorter tensor would hold other noise
        chunk.normal_(generator=generator)
        if first + CHUNK_DRAWS > start:
            yield chunk[max(0, start - first) : min(CHUNK_DRAWS, n - first)]


def _install_substream(generator: torch.Generator, key: tuple[int, ...], seed: int) -> None:
    """Set the whole state of ``generator`` from ``(seed, key)``; ``manual_seed`` would keep 32 bits of it."""
    words = np.random.SeedSequence(seed, spawn_key=key).generate_state(_WORDS, np.uint32)
    # a freshly seeded generator is about to compute its first 624 outputs and holds no cached normal value
    state = generator.manual_seed(0).get_state()
    if state.numel() != _STATE_BYTES:
        raise RuntimeError(
            f"The state of torch's CPU generator must have {_STATE_BYTES} bytes, got {state.numel()} from torch "
            f"{torch.__version__}: use a version of torch that this package supports."
        )
    state[_WORDS_AT : _WORDS_AT + 8 * _WORDS] = torch.from_numpy(words.astype("<u8").view(np.uint8))
    generator.set_state(state)
