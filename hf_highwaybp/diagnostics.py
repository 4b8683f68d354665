"""How far Highway-BP's gradients are from exact ones, measured on a batch."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_highwaybp.highway import HighwayBP
from hf_highwaybp.residual import ResidualMap

LossFunction = Callable[[nn.Module, Mapping[str, Any]], Tensor]
Gradients = dict[int, Tensor]


@dataclass(frozen=True)
class GradientReport:
    """Highway-BP against exact backpropagation on one batch.

    Cosines are in ``[-1, 1]`` and ``nan`` for a zero gradient; a relative error is the norm of the difference over the
    norm of the exact gradient, and ``inf`` or ``nan`` if that is zero.

    Attributes:
        k: Iterations asked for; ``None`` for exact.
        loss: Value of the loss, the same in both passes.
        cosine: Over the parameters of all blocks together.
        relative_error: The same.
        block_names: Names of the blocks.
        block_cosines: Over the parameters of each block.
        block_relative_errors: The same.
        all_cosine: Over all parameters of the model.
        all_relative_error: The same.
        vjps: Vector-Jacobian products of single blocks that Highway-BP took.
        description: What was compared: the stack, ``k`` and K.
    """

    k: int | None
    loss: float
    cosine: float
    relative_error: float
    block_names: tuple[str, ...]
    block_cosines: tuple[float, ...]
    block_relative_errors: tuple[float, ...]
    all_cosine: float
    all_relative_error: float
    vjps: int
    description: str

    def __str__(self) -> str:
        return f"{self.description}: cosine {self.cosine:.4f}, relative error {self.relative_error:.2e}"


def compare_exact(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    k: int | None,
    residual: str | float | ResidualMap | None = "default",
    blocks: str | Sequence[nn.Module] | None = None,
    loss_fn: LossFunction | None = None,
) -> GradientReport:
    """Compare Highway-BP's gradients with those of backpropagation on one batch.

    Both passes run in train mode from the same state of torch's generators, so dropout draws the same masks. Nothing
    is mutated: gradients, buffers, generators and train or eval mode are as before. Costs two training steps and one
    more copy of the gradients.

    Args:
        model: The model, with no engine attached.
        batch: Keyword arguments of the model, on its device.
        k: Number of iterations; ``None`` for exact.
        residual: The residual map, as for ``HighwayBP``.
        blocks: The stack, as for ``HighwayBP``.
        loss_fn: From model and batch to a scalar loss; ``None`` takes ``model(**batch).loss``.

    Returns:
        Cosines and relative errors, of the blocks and of the whole model; norms are taken in float64.

    Raises:
        UnsupportedModelError: If the model has no stack of blocks, or several of equal standing.
        AttachError: If an engine is attached to the model.
        ValueError: If ``k`` or ``residual`` is out of range.
        TypeError: If there is no scalar loss to differentiate.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=3, n_head=2, vocab_size=11, use_cache=False))
        >>> ids = torch.arange(10)[None]
        >>> compare_exact(model, {"input_ids": ids, "labels": ids}, k=2).cosine > 0.999999
        True
    """
    hbp = HighwayBP(model, k=k, residual=residual, blocks=blocks)
    exact, approximate, loss = _both_ways(hbp, model, batch, loss_fn or _default_loss)
    per_block = [[id(p) for p in block.parameters() if id(p) in exact] for block in hbp.stack.blocks]
    figures = [_figures(exact, approximate, own) for own in per_block]
    # a parameter shared by two blocks counts once
    cosine, error = _figures(exact, approximate, list(dict.fromkeys(p for own in per_block for p in own)))
    all_cosine, all_error = _figures(exact, approximate, list(exact))
    return GradientReport(
        k=k,
        loss=loss,
        cosine=cosine,
        relative_error=error,
        block_names=hbp.stack.names,
        block_cosines=tuple(figure[0] for figure in figures),
        block_relative_errors=tuple(figure[1] for figure in figures),
        all_cosine=all_cosine,
        all_relative_error=all_error,
        vjps=0 if hbp.stats is None else hbp.stats.vjps,
        description=hbp.describe(),
    )


def _default_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    loss = getattr(model(**batch), "loss", None)
    if not isinstance(loss, Tensor):
        raise TypeError("The model must return a loss: put labels into the batch, or pass loss_fn(model, batch).")
    return loss


def _both_ways(
    hbp: HighwayBP, model: nn.Module, batch: Mapping[str, Any], measure: LossFunction
) -> tuple[Gradients, Gradients, float]:
    with _unchanged(model), hbp:
        hbp.enabled = False
        exact, loss = _gradients(model, batch, measure)
        hbp.enabled = True
        approximate, _ = _gradients(model, batch, measure)
    return exact, approximate, loss


@contextlib.contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Put the model in train mode, and give gradients, buffers, generators and modes back at the end."""
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    with torch.random.fork_rng():
        try:
            model.train()
            yield
        finally:
            for module, training in modes:
                module.training = training
            for parameter, gradient in gradients:
                parameter.grad = gradient
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)


def _gradients(model: nn.Module, batch: Mapping[str, Any], measure: LossFunction) -> tuple[Gradients, float]:
    for parameter in model.parameters():
        parameter.grad = None
    # the inner fork leaves the generators where the other pass finds them
    with torch.random.fork_rng(), torch.enable_grad():
        loss = measure(model, batch)
        loss.backward()
    return {id(p): p.grad for p in model.parameters() if p.grad is not None}, float(loss.detach())


def _figures(exact: Gradients, approximate: Gradients, keys: list[int]) -> tuple[float, float]:
    """Return cosine and relative error over the parameters ``keys``."""
    product = exact_square = approximate_square = difference = 0.0
    for key in keys:
        a = exact[key].double()
        b = approximate[key].double() if key in approximate else torch.zeros_like(a)
        product += float((a * b).sum())
        exact_square += float(a.square().sum())
        approximate_square += float(b.square().sum())
        difference += float((a - b).square().sum())
    scale = (exact_square * approximate_square) ** 0.5
    cosine = product / scale if scale else float("nan")
    if exact_square:
        return cosine, float((difference / exact_square) ** 0.5)
    return cosine, float("inf") if difference else float("nan")
