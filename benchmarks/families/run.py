"""Running a small model: its outputs as tensors, and chain attention for a while."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.families.oracle import Softmaxes

Batch = dict[str, Any]


@torch.no_grad()
def outputs(model: PreTrainedModel, batch: Batch, softmaxes: Softmaxes | None = None) -> list[Tensor]:
    """Return the floating tensors of a model's output.

    Args:
        model: In eval mode.
        batch: Its arguments.
        softmaxes: Sees what the model computes.
    """
    # some models draw, in eval mode too
    torch.manual_seed(0)
    with softmaxes or Softmaxes():
        result = model(**in_dtype(batch, model.dtype))
    values = result.values() if isinstance(result, dict) else (result if isinstance(result, tuple) else [result])
    return [tensor for tensor in _tensors(values) if tensor.is_floating_point()]


def in_dtype(batch: Batch, dtype: torch.dtype) -> Batch:
    """Return a batch whose floating tensors have the dtype of a model."""
    return {name: value.to(dtype) if _is_floating(value) else value for name, value in batch.items()}


def _is_floating(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _tensors(values: Any) -> Iterator[Tensor]:  # noqa: ANN401  whatever a model returns
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            yield from _tensors(value.values())
        elif isinstance(value, tuple | list):
            yield from _tensors(value)


def relative(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest error of all tensors, each over the largest entry of what was expected."""
    return max(
        ((one - other).abs().max() / other.abs().max().clamp_min(1e-12)).item()
        for one, other in zip(actual, expected, strict=True)
        if other.numel()
    )


@contextlib.contextmanager
def switched(
    model: PreTrainedModel, gamma: float, request: str | dict[str, str], *, encoder: bool = True
) -> Iterator[None]:
    """Let a model with eager attention be a chain for a while, as a whole or some of its parts."""
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            part.config.chain_attention = {"gamma": gamma, "encoder": encoder}
    try:
        model.set_attn_implementation(request)
        yield
    finally:
        model.set_attn_implementation("eager")
