"""What the chain benchmark compares: the inputs, the four ways to attend, and the two passes that are timed."""

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from hf_chainattn import chain_attention

HEADS, WIDTH, GAMMA = 8, 64, 0.9
# bytes: what eager attention and the naive solve may take, at about twelve [T, T] matrices of float32 for each head
ROOM, MATRICES = 6e9, 12

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Inputs = tuple[list[Tensor], Tensor]


def inputs(batch: int, tokens: int) -> Inputs:
    """Return query, key and value, which require gradients, and a cotangent: ``[batch, 8, tokens, 64]``, float32.

    The same ones in every call and every process.
    """
    generator = torch.Generator().manual_seed(batch * tokens)
    shape = (batch, HEADS, tokens, WIDTH)
    query, key, value = (torch.randn(shape, generator=generator, requires_grad=True) for _ in range(3))
    return [query, key, value], torch.randn(shape, generator=generator)


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Ordinary causal attention as PyTorch computes it."""
    output: Tensor = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    return output


@functools.lru_cache(maxsize=1)
def causal_mask(tokens: int) -> Tensor:
    """Return the additive mask ``[tokens, tokens]`` that a model makes once for all its layers."""
    return torch.full((tokens, tokens), torch.finfo(torch.float32).min).triu_(1)


def eager(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Ordinary causal attention as ``eager_attention_forward`` of transformers computes it."""
    logits = query @ key.transpose(2, 3) * WIDTH**-0.5 + causal_mask(query.shape[2])
    return torch.softmax(logits, dim=-1, dtype=torch.float32).to(query.dtype) @ value


def naive(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Chain attention as one would write it down: the attention matrix, a triangular solve, and autograd."""
    tokens = query.shape[2]
    attention = torch.softmax(query @ key.transpose(2, 3) * WIDTH**-0.5 + causal_mask(tokens), dim=-1)
    walk = torch.eye(tokens) - GAMMA * attention
    return attention @ torch.linalg.solve_triangular(walk, (1 - GAMMA) * value, upper=False)


def chain(diagonal: str = "kept", window: int | None = None) -> Attention:
    """Return chain attention at the gamma of the benchmark."""
    return functools.partial(chain_attention, gamma=GAMMA, diagonal=diagonal, window=window)


ATTENTIONS: dict[str, Attention] = {"chain": chain(), "sdpa": sdpa, "eager": eager, "naive": naive}


def fits(batch: int, tokens: int) -> bool:
    """Return whether there is room for what holds the attention matrix."""
    return 4 * MATRICES * batch * HEADS * tokens**2 <= ROOM


def forward(attention: Attention, parts: list[Tensor], cotangent: Tensor) -> Tensor:
    """Return the output, without a graph. The cotangent is not used."""
    with torch.no_grad():
        return attention(*parts)


def both(attention: Attention, parts: list[Tensor], cotangent: Tensor) -> tuple[Tensor, ...]:
    """Return the output and the gradients of query, key and value."""
    output = attention(*parts)
    return output.detach(), *torch.autograd.grad(output, parts, cotangent)


PASSES = {"forward": forward, "forward + backward": both}


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch use so many threads, and afterwards as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
