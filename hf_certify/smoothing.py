"""The smoothed classifier: what the certificates are about."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import special
from torch import Tensor, nn

from hf_certify.bounds import require_certifiable
from hf_certify.certificate import Certificate, as_votes
from hf_certify.config import BatchSize, CertifyConfig, IntervalName, MarginOption, check_alpha, check_index
from hf_certify.errors import InvalidLogitsError, UnsupportedModelError
from hf_certify.logits import LogitsModel
from hf_certify.noise import Stage, fresh_seed, require_resolution
from hf_certify.partition import rank_classes
from hf_certify.perturbation import GaussianNoise
from hf_certify.sampling import count_votes, default_batch_size, require_eval_mode

Progress = Callable[[int], object]

# with eight standard deviations of the largest sigma on top, nothing leaves float32
_MAX_VALUE = 1e38


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """A prediction of the smoothed classifier with its evidence.

    Attributes:
        label: The predicted class, or ``None`` for an abstention. Differs from the most probable class of the noisy
            input with probability at most ``alpha``.
        p_value: Of the two-sided test that the two leading classes are equally probable, in ``[0, 1]``.
        counts: `[K]` votes.
        alpha: Failure probability, in ``(0, 1)``.
    """

    label: int | None
    p_value: float
    counts: tuple[int, ...]
    alpha: float

    @classmethod
    def from_counts(cls, counts: Sequence[int] | NDArray[np.int64], *, alpha: float) -> Self:
        """Return what votes predict: the two leading classes are compared by a two-sided binomial test at ``alpha``.

        Args:
            counts: `[K]` votes, ``K >= 2``, at least one vote.
            alpha: Failure probability, in ``(0, 1)``.

        Raises:
            ValueError: If ``alpha`` is out of range, or ``counts`` are not votes.

        Example:
            >>> Prediction.from_counts([60, 40, 0], alpha=0.05).label is None
            True
            >>> Prediction.from_counts([61, 39, 0], alpha=0.05).label
            0
        """
        check_alpha(alpha)
        votes = as_votes(counts)
        first, second = rank_classes(votes)[:2]
        p_value = _two_sided_p_value(int(votes[first]), int(votes[second]))
        label = int(first) if p_value <= alpha else None
        return cls(label=label, p_value=p_value, counts=tuple(votes.tolist()), alpha=alpha)


class SmoothedClassifier:
    """The classifier ``g(x) = argmax over k of P(model(x + sigma * noise) = k)``, noise standard normal.

    ``g`` cannot be evaluated exactly; ``predict`` and ``certify`` make statements about it from votes. They say
    nothing about ``model`` itself. Draws are made on the CPU and moved to the device of the input.

    Args:
        model: Maps `[B, *shape]` float32 to logits `[B, K]` or to an object with such ``logits``, each row by itself.
            A transformers model gets ``x`` as its main input, such as ``pixel_values``, in its own dtype; a text model
            as ``inputs_embeds``. Not modified.
        sigma: Standard deviation of the noise, in the units of ``x``, at least ``2**-12 * max(1, max |x|)``: float32
            would round less noise away.
        num_classes: K, ``>= 2``. ``None`` takes the ``num_labels`` of the model's config.
        batch_size: Rows of every forward pass, ``>= 1``, or ``auto``.
        seed: Root of all noise, in ``[0, 2**128)``; ``None`` draws 128 bits from the operating system. Must be chosen
            independently of model and inputs: the best of several seeds is not a certificate.

    Raises:
        TypeError: If ``model`` is not an ``nn.Module``, or a setting is of the wrong kind.
        ValueError: If a setting is out of range.
        UnsupportedModelError: If there are fewer than 2 classes, or a module is in training mode.

    Example:
        >>> model = nn.Linear(2, 2, bias=False).eval()
        >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
        >>> smoothed = SmoothedClassifier(model, sigma=0.5, num_classes=2, seed=0)
        >>> certificate = smoothed.certify(torch.tensor([1.0, 0.0]), n=10_000)
        >>> certificate.label, 0.9 < certificate.radius < 1.0
        (0, True)
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        sigma: float,
        num_classes: int | None = None,
        batch_size: BatchSize = "auto",
        seed: int | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {model!r} of type {type(model).__name__}.")
        if num_classes is None:
            num_classes = getattr(getattr(model, "config", None), "num_labels", None)
        if not isinstance(num_classes, int):
            raise TypeError(
                f"num_classes must be an int >= 2, got {num_classes!r} of type {type(num_classes).__name__}; only a "
                f"model whose config has num_labels can go without."
            )
        if num_classes < 2:
            raise UnsupportedModelError(
                f"A classifier must have at least 2 classes, got num_classes={num_classes!r}: there is no other class "
                f"that a perturbation could reach."
            )
        require_eval_mode(model)
        self.model = model
        self._logits = LogitsModel(model)
        self.num_classes = num_classes
        settings = CertifyConfig(sigma=sigma, batch_size=batch_size, seed=seed)
        self.sigma = settings.sigma
        self.batch_size = settings.batch_size
        self.seed = fresh_seed() if settings.seed is None else settings.seed
        self._next_index = 0

    def certify(
        self,
        x: Tensor,
        *,
        n0: int = 100,
        n: int = 100_000,
        alpha: float = 0.001,
        interval: IntervalName = "max_upper",
        margin: MarginOption = "auto",
        index: int | None = None,
        source: str | None = None,
        on_draws: Progress | None = None,
    ) -> Certificate:
        """Return a certificate for one input, wrong with probability at most ``alpha``.

        Costs ``n0 + n`` forward rows.

        Args:
            x: `[*shape]` float32, finite, on the device of the model.
            n0: Draws that pick the class, ``>= 1``.
            n: Independent draws that give the bounds, ``>= 1``.
            alpha: Failure probability, in ``(0, 1)``.
            interval: Rule for the bounds, see ``CertifyConfig``.
            margin: ``auto``, ``mono`` or ``multi``, see ``CertifyConfig``.
            index: Number of the input, ``>= 0``: the same number means the same noise. ``None`` takes the next one
                that this object has not used.
            source: Where the input came from, kept in the certificate.
            on_draws: Called with the number of draws after each forward pass.

        Raises:
            TypeError: If ``x`` is not a float32 tensor, or a setting is of the wrong kind.
            ValueError: If ``x`` is empty or not finite, a setting is out of range, ``sigma`` is too small for ``x``,
                or ``n`` is too small to certify anything.
            UnsupportedModelError: If a module is in training mode, or the output is not `[B, K]`.
            InvalidLogitsError: If a logit is NaN or infinite.
        """
        check_input(x, self.sigma)
        config = CertifyConfig(sigma=self.sigma, n0=n0, n=n, alpha=alpha, interval=interval, margin=margin)
        require_certifiable(alpha, n, interval=interval, margin=config.resolved_margin, num_classes=self.num_classes)
        number = self._take_index(index)
        rows = default_batch_size(self.model, x.numel(), n) if self.batch_size == "auto" else self.batch_size
        selection = self._count(x, n0, number, Stage.SELECTION, rows, on_draws)
        estimation = self._count(x, n, number, Stage.ESTIMATION, rows, on_draws)
        return Certificate.from_counts(
            selection.tolist(),
            estimation.tolist(),
            sigma=self.sigma,
            alpha=alpha,
            interval=interval,
            margin=margin,
            index=number,
            source=source,
        )

    def predict(self, x: Tensor, *, n: int = 1000, alpha: float = 0.001, index: int | None = None) -> Prediction:
        """Return the class that ``g`` predicts, or an abstention (PREDICT of arXiv 1902.02918).

        The two leading classes are compared by a two-sided binomial test at ``alpha``. No radius is claimed.

        Args:
            x: `[*shape]` float32, finite, on the device of the model.
            n: Draws, ``>= 1``; costs as many forward rows.
            alpha: Failure probability, in ``(0, 1)``.
            index: Number of the input, see ``certify``.

        Raises:
            TypeError: If ``x`` is not a float32 tensor, or a setting is of the wrong kind.
            ValueError: If ``x`` is empty or not finite, a setting is out of range, or ``sigma`` is too small for
                ``x``.
            UnsupportedModelError: If a module is in training mode, or the output is not `[B, K]`.
            InvalidLogitsError: If a logit is NaN or infinite.
        """
        check_input(x, self.sigma)
        CertifyConfig(sigma=self.sigma, n=n, alpha=alpha)
        rows = default_batch_size(self.model, x.numel(), n) if self.batch_size == "auto" else self.batch_size
        counts = self._count(x, n, self._take_index(index), Stage.PREDICTION, rows, None)
        return Prediction.from_counts(counts, alpha=alpha)

    def _take_index(self, index: int | None) -> int:
        """Return ``index``, or the next number that was not used yet."""
        if index is not None:
            check_index(index)
        number = self._next_index if index is None else index
        self._next_index = max(self._next_index, number + 1)
        return number

    def _count(
        self, x: Tensor, n: int, index: int, stage: Stage, rows: int, on_draws: Progress | None
    ) -> NDArray[np.int64]:
        """Return the votes `[K]` of one sample."""
        noise = GaussianNoise(x, self.sigma)
        # here, where the names of modules are those that the user knows
        require_eval_mode(self.model)
        try:
            return count_votes(
                self._logits,
                noise,
                noise.draw(n, seed=self.seed, index=index, stage=stage),
                num_classes=self.num_classes,
                batch_size=rows,
                on_batch=None if on_draws is None else lambda draws, _: on_draws(draws),
            )
        except InvalidLogitsError as error:
            raise InvalidLogitsError(f"Input {index}: {error}") from error


def _two_sided_p_value(leader: int, second: int) -> float:
    """Return the exact p-value of ``leader`` against ``second`` votes, ``leader >= second``, under equal odds."""
    if leader == second:
        return 1.0
    # P(X >= leader) for X ~ Binomial(leader + second, 1/2), as a regularised beta function; rounded up
    tail = float(special.betainc(leader, second + 1.0, 0.5))
    return min(1.0, 2 * tail * (1 + 1e-12))


def check_input(x: Tensor, sigma: float) -> None:
    """Raise unless ``x`` is a finite float32 tensor with at least one element to which the noise can be added."""
    if not isinstance(x, Tensor) or x.dtype != torch.float32:
        got = str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x must be a float32 tensor, got {got}: pass x.float(), which is then what is certified.")
    if x.numel() == 0 or not bool(torch.isfinite(x).all()):
        raise ValueError(f"x must hold at least one value and be finite, got a tensor of shape {list(x.shape)}.")
    largest = float(x.abs().max())
    if largest > _MAX_VALUE:
        raise ValueError(
            f"x must hold values up to {_MAX_VALUE:g}, got {largest:.4g}: float32 would overflow; rescale x."
        )
    require_resolution(sigma, largest)
