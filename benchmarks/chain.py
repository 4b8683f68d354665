"""Chain attention against PyTorch's own attention: forward, and forward with backward."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.registry import Row, alternate, benchmark, ratio
from hf_chainattn import chain_attention, chain_attention_reference

HEADS, WIDTH = 8, 64


def ordinary(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention as PyTorch computes it."""
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)


def chained(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal chain attention at the default gamma."""
    return chain_attention(query, key, value, gamma=0.9)


@benchmark
def chain() -> Iterator[Row]:
    """Yield the time of chain attention over that of sdpa, float32, by number of tokens."""
    for tokens in (64, 128, 256, 512, 1024):
        inputs = [torch.randn(1, HEADS, tokens, WIDTH, requires_grad=True) for _ in range(3)]
        cotangent = torch.randn(1, HEADS, tokens, WIDTH)
        exact = chain_attention_reference(*(tensor.double() for tensor in inputs), gamma=0.9)
        error = ((chained(*inputs) - exact).norm() / exact.norm()).item()
        if error > 2e-6:
            raise AssertionError(f"chain attention is wrong at T = {tokens}: relative error {error:.1e}")

        def forward(function: Callable[..., Tensor], inputs: list[Tensor] = inputs) -> None:
            with torch.no_grad():
                function(*inputs)

        def both(
            function: Callable[..., Tensor], inputs: list[Tensor] = inputs, cotangent: Tensor = cotangent
        ) -> None:
            torch.autograd.grad(function(*inputs), inputs, cotangent)

        for name, work in (("forward", forward), ("forward + backward", both)):
            times = alternate({"chain": lambda w=work: w(chained), "sdpa": lambda w=work: w(ordinary)})
            yield {"case": name, "tokens": tokens, "relative_error": error, **ratio(times, "chain", "sdpa")}
