"""How far Highway-BP's gradients are from exact ones, measured on a batch."""

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

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

    Both passes run in train mode from the same buffers and the same state of the generators of torch, numpy and
    Python, so dropout draws the same masks. Nothing of these is mutated, nor gradients of any tensor, nor train or
    eval mode; other attributes that a forward pass sets stay as it leaves them. Hooks on accumulated gradients do not
    run. Costs two training steps, two sets of gradients and a copy of the buffers; under DistributedDataParallel the
    gradients are those of this process.

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
        TypeError: If there is no loss to differentiate, or ``batch`` is no dict and there is no ``loss_fn``.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=3, n_head=2, vocab_size=11, use_cache=False))
        >>> ids = torch.arange(10)[None]
        >>> compare_exact(model, {"input_ids": ids, "labels": ids}, k=2).cosine > 0.999999
        True
    """
    if loss_fn is None and not isinstance(batch, Mapping):
        raise TypeError(f"batch must be a dict of the model's keyword arguments, got {type(batch).__name__}.")
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
    with _training(model), hbp:
        hbp.enabled = False
        exact, loss = _gradients(model, batch, measure)
        hbp.enabled = True
        approximate, _ = _gradients(model, batch, measure)
    return exact, approximate, loss


@contextlib.contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """Put the model in train mode, and every module back at the end."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.train()
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def _restored_generators() -> Iterator[None]:
    # the global generator is what models draw from that draw from numpy
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


@contextlib.contextmanager
def _restored_buffers(model: nn.Module) -> Iterator[None]:
    """Give every module its buffers back: the same objects with the same values."""
    kept = [(module, dict(module._buffers)) for module in model.modules()]
    values = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for module, buffers in kept:
            module._buffers.clear()
            module._buffers.update(buffers)
        with torch.no_grad():
            for buffer, value in values:
                buffer.copy_(value)


def _gradients(model: nn.Module, batch: Mapping[str, Any], measure: LossFunction) -> tuple[Gradients, float]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # outside of no_sync the reducer would wait for hooks that torch.autograd.grad does not call
    alone = model.no_sync() if isinstance(model, DistributedDataParallel) else contextlib.nullcontext()
    # what a pass changes is given back before the other begins
    with _restored_buffers(model), _restored_generators(), alone, torch.enable_grad():
        loss = measure(model, batch)
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
    known = {id(p): gradient for p, gradient in zip(parameters, found, strict=True) if gradient is not None}
    return known, float(loss.detach())


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
