"""The counting loop: noisy copies of one input through the model, one vote each."""

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hf_certify.errors import InvalidLogitsError, UnsupportedModelError
from hf_certify.perturbation import Perturbation

# "auto": rows by model size, as measured on CPUs, where a batch that fits the cache wins; at most 64 MiB
_ROWS_BY_PARAMETERS = ((1_000_000, 256), (10_000_000, 128))
_ROWS_OF_LARGE_MODELS = 32
_BUFFER_BYTES = 2**26


def default_batch_size(model: nn.Module, input_size: int, n: int) -> int:
    """Return the rows per forward pass that ``auto`` stands for: a function of sizes alone, never of a timing.

    Args:
        model: Counted by its parameters.
        input_size: Elements of one input, ``>= 1``.
        n: Draws of the larger sample, ``>= 1``; more rows than that would only be padding.

    Example:
        >>> default_batch_size(nn.Linear(4, 2), input_size=4, n=100_000)
        256
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    rows = next((rows for limit, rows in _ROWS_BY_PARAMETERS if parameters <= limit), _ROWS_OF_LARGE_MODELS)
    return max(1, min(rows, n, _BUFFER_BYTES // (4 * input_size)))


def require_eval_mode(model: nn.Module) -> None:
    """Raise unless every module of ``model`` is in evaluation mode and treats each row of a batch by itself.

    Raises:
        UnsupportedModelError: If one is training, or normalises by the statistics of the batch in evaluation mode:
            dropout or batch statistics would make votes depend on one another.
    """
    training = [name or "the model itself" for name, module in model.named_modules() if module.training]
    if training:
        raise UnsupportedModelError(
            f"All modules must be in evaluation mode, got {len(training)} in training mode (first: {training[0]!r}): "
            f"call model.eval()."
        )
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            raise UnsupportedModelError(
                f"Batch normalisation must use running statistics, got {name or 'the model itself'!r} without: in "
                f"evaluation mode, too, it mixes the rows of a batch; train it with track_running_stats=True."
            )


def count_votes(
    model: nn.Module,
    perturbation: Perturbation,
    drawn: Iterable[Tensor],
    *,
    num_classes: int,
    batch_size: int,
    outputs: tuple[int, ...] = (),
    on_batch: Callable[[int, Tensor], object] | None = None,
) -> NDArray[np.int64]:
    """Return how often the model predicts each class on perturbed copies of one input.

    The model always sees ``batch_size`` rows: the last batch is padded with the input, whose votes are not counted.
    Votes are then bit-identical however the draws are cut into chunks, on the same machine and number of threads.

    Args:
        model: Maps `[batch_size, *shape]` to logits `[batch_size, *outputs, K]`, each row by itself, in evaluation
            mode.
        perturbation: Makes the copies; its ``base`` is on the device of the model.
        drawn: What it makes them of, in chunks `[draws, ...]`; not modified.
        num_classes: K, ``>= 2``.
        batch_size: Rows of every forward pass, ``>= 1``.
        outputs: Nothing for one answer to an input, else the number of answers, such as labels that do not exclude
            one another.
        on_batch: Called after each forward pass with the number of draws in it, and the votes so far
            `[*outputs, K]`, on the device; they change with the next pass.

    Returns:
        `[*outputs, K]` int64 votes; they sum to the number of draws for each answer.

    Raises:
        UnsupportedModelError: If a module is in training mode, or the logits have another shape.
        InvalidLogitsError: If a logit is NaN or infinite.

    Example:
        >>> from hf_certify.perturbation import GaussianNoise
        >>> model, noise = nn.Linear(2, 3).eval(), GaussianNoise(torch.zeros(2), sigma=1.0)
        >>> counts = count_votes(model, noise, [torch.randn(10, 2)], num_classes=3, batch_size=4)
        >>> int(counts.sum())
        10
    """
    require_eval_mode(model)
    base = perturbation.base
    batch = base.new_empty((batch_size, *base.shape))
    counts = torch.zeros((math.prod(outputs), num_classes), dtype=torch.int64, device=base.device)
    # the place of each answer in the flat counts
    offsets = torch.arange(len(counts), device=base.device) * num_classes
    filled = 0

    def forward() -> None:
        batch[filled:] = base
        logits = checked_logits(model(batch), (batch_size, *outputs, num_classes))[:filled]
        votes = logits.argmax(dim=-1).reshape(filled, len(counts)) + offsets
        counts.view(-1).add_(torch.bincount(votes.reshape(-1), minlength=counts.numel()))
        if on_batch is not None:
            on_batch(filled, counts.view(*outputs, num_classes))

    with torch.inference_mode():
        for cpu_chunk in drawn:
            chunk = cpu_chunk.to(base.device)
            used = 0
            while used < len(chunk):
                rows = min(batch_size - filled, len(chunk) - used)
                perturbation.write(chunk[used : used + rows], batch[filled : filled + rows])
                filled, used = filled + rows, used + rows
                if filled == batch_size:
                    forward()
                    filled = 0
        if filled:
            forward()
    return counts.view(*outputs, num_classes).cpu().numpy()


def checked_logits(logits: object, shape: tuple[int, ...]) -> Tensor:
    """Return logits, after checking that they are finite and have this shape."""
    if not isinstance(logits, Tensor) or logits.shape != shape:
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UnsupportedModelError(
            f"The model must return logits of shape {list(shape)}, got {got!r}: set num_classes to what "
            f"the model returns, or wrap the model so that it returns the logits alone."
        )
    if not bool(torch.isfinite(logits).all()):
        raise InvalidLogitsError(
            "Logits must be finite on every noisy input, got NaN or infinity: a NaN cannot be a vote. Use a model "
            "that is stable at this sigma, or a wider dtype."
        )
    return logits
