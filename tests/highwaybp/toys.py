"""Small stacks with one trait each, and the figures that the tests compare."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

WIDTH = 6


class Residual(nn.Module):
    """x + tanh(W x), the pre-norm pattern."""

    def __init__(self, width: int = WIDTH):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.linear(hidden_states).tanh()


class PostNorm(Residual):
    """LayerNorm(x + tanh(W x)), the post-norm pattern."""

    def __init__(self, width: int = WIDTH):
        super().__init__(width)
        self.norm = nn.LayerNorm(width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.norm(super().forward(hidden_states))


class Stack(nn.Module):
    """An embedding, a list of blocks, a head."""

    def __init__(self, make_block: Callable[[], nn.Module] = Residual, depth: int = 4, width: int = WIDTH):
        super().__init__()
        self.embed = nn.Linear(width, width)
        self.layers = nn.ModuleList(make_block() for _ in range(depth))
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.embed(x)
        for block in self.layers:
            hidden = block(hidden)
        return self.head(hidden).square().mean()


def toy(make_block: Callable[[], nn.Module] = Residual, depth: int = 4, seed: int = 0) -> Stack:
    torch.manual_seed(seed)
    return Stack(make_block, depth).double()


def inputs(rows: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(rows, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gradients(model: nn.Module, loss: Callable[[], Tensor], seed: int = 3) -> dict[str, Tensor]:
    """Gradients of all parameters, from zero, with dropout drawn from ``seed``."""
    model.zero_grad()
    torch.manual_seed(seed)
    loss().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def largest_error(expected: dict[str, Tensor], found: dict[str, Tensor]) -> float:
    """Greatest relative error over the parameters; the two must cover the same ones."""
    assert expected.keys() == found.keys()
    errors = {name: float((expected[name] - found[name]).detach().norm()) for name in expected}
    # the gradient of a key bias is zero but for rounding: it is measured against the gradients of the whole model
    floor = 1e-3 * max(float(value.detach().norm()) for value in expected.values())
    return max(error / max(float(expected[name].detach().norm()), floor) for name, error in errors.items())
