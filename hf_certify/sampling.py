"""The counting loop: noisy copies of one input through the model, one vote each."""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hf_certify.errors import InvalidLogitsError, UnsupportedModelError

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
    x: Tensor,
    noise: Iterable[Tensor],
    *,
    sigma: float,
    num_classes: int,
    batch_size: int,
    on_draws: Callable[[int], object] | None = None,
) -> NDArray[np.int64]:
    """Return how often the model predicts each class on ``x + sigma * noise``.

    The model always sees ``batch_size`` rows: the last batch is padded with ``x``, whose votes are not counted. Votes
    are then bit-identical however the noise is cut into chunks, on the same machine and number of threads.

    Args:
        model: Maps `[batch_size, *shape]` to logits `[batch_size, K]`, each row by itself, in evaluation mode.
        x: `[*shape]` float32, on the device of the model.
        noise: Chunks `[draws, *shape]` float32 of standard normal draws; not modified.
        sigma: Standard deviation of the noise, ``> 0``, in the units of ``x``.
        num_classes: K, ``>= 2``.
        batch_size: Rows of every forward pass, ``>= 1``.
        on_draws: Called with the number of draws that a finished forward pass counted.

    Returns:
        `[K]` int64 votes; they sum to the number of draws.

    Raises:
        UnsupportedModelError: If a module is in training mode, or the output is not `[batch_size, K]`.
        InvalidLogitsError: If a logit is NaN or infinite.

    Example:
        >>> model = nn.Linear(2, 3).eval()
        >>> counts = count_votes(model, torch.zeros(2), [torch.randn(10, 2)], sigma=1.0, num_classes=3, batch_size=4)
        >>> int(counts.sum())
        10
    """
    require_eval_mode(model)
    batch = torch.empty((batch_size, *x.shape), device=x.device)
    counts = torch.zeros(num_classes, dtype=torch.int64, device=x.device)
    filled = 0

    def forward() -> None:
        batch[filled:] = x
        votes = _predict(model, batch, num_classes)[:filled]
        counts.add_(torch.bincount(votes, minlength=num_classes))
        if on_draws is not None:
            on_draws(filled)

    with torch.inference_mode():
        for cpu_chunk in noise:
            chunk = cpu_chunk.to(x.device)
            used = 0
            while used < len(chunk):
                rows = min(batch_size - filled, len(chunk) - used)
                torch.add(x, chunk[used : used + rows], alpha=sigma, out=batch[filled : filled + rows])
                filled, used = filled + rows, used + rows
                if filled == batch_size:
                    forward()
                    filled = 0
        if filled:
            forward()
    return counts.cpu().numpy()


def _predict(model: nn.Module, batch: Tensor, num_classes: int) -> Tensor:
    """Return the predicted classes `[B]` of a batch `[B, *shape]`, after checking the logits."""
    logits = model(batch)
    if not isinstance(logits, Tensor) or logits.shape != (len(batch), num_classes):
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UnsupportedModelError(
            f"The model must return logits of shape {[len(batch), num_classes]}, got {got!r}: set num_classes to what "
            f"the model returns, or wrap the model so that it returns the logits alone."
        )
    if not bool(torch.isfinite(logits).all()):
        raise InvalidLogitsError(
            "Logits must be finite on every noisy input, got NaN or infinity: a NaN cannot be a vote. Use a model "
            "that is stable at this sigma, or a wider dtype."
        )
    return logits.argmax(dim=-1)
