"""The smoothed classifier in the place of the pipeline: what was certified is what answers."""

import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from hf_certify.config import BatchSize, CertifyConfig
from hf_certify.errors import ReportFolderError, UnsupportedModelError
from hf_certify.loading import load_pipeline
from hf_certify.noise import Stage, fresh_seed, require_resolution
from hf_certify.partition import rank_classes
from hf_certify.runner import count_sample
from hf_certify.sampling import default_batch_size, require_eval_mode
from hf_certify.smoothing import Prediction, check_input
from hf_certify.spaces import space_of
from hf_certify.spaces.base import Space
from hf_certify.storage import encode_report, replace_file

if TYPE_CHECKING:
    from transformers import Pipeline

ABSTAIN: Final = "ABSTAIN"
SMOOTHING_FILE: Final = "smoothing.json"

# raise it whenever the meaning of a stored key changes
SMOOTHING_SCHEMA: Final = 1

_KEYS = frozenset({"schema", "task", "space", "sigma", "n", "alpha", "batch_size"})

Answer = list[dict[str, Any]]


class SmoothedPipeline:
    """A pipeline that answers with the vote of its model under noise: the classifier that certificates are about.

    Called with one input, it returns a list of ``{"label": ..., "score": ...}``, the most voted class first; called
    with a list, a list of such lists; called with a generator, a generator of them. ``score`` is the share of ``n``
    votes, not a probability of the model. If the two leading classes are too close for ``alpha``, the first label is
    the constant ``ABSTAIN``, with score 0.

    Within the radius of a certificate it answers with the certified label or abstains, except with probability at
    most ``alpha`` of the certificate plus ``alpha`` of the answer. Every answer has noise of its own, so that repeated
    questions are independent. Costs ``n`` forward rows for each input.

    Args:
        pipe: Pipeline with a model in evaluation mode, or a space.
        sigma: Standard deviation of the noise: that of the certificates.
        n: Votes for each answer, ``>= 1``.
        alpha: Failure probability of each answer, in ``(0, 1)``.
        batch_size: Rows of every forward pass, ``>= 1``, or ``auto``.
        seed: Root of all noise, for tests. ``None`` takes 128 bits from the operating system for every call; who knows
            the noise beforehand can choose an input for which it is wrong.

    Raises:
        TypeError: If ``pipe`` is not a pipeline, or a setting is of the wrong kind.
        ValueError: If a setting is out of range, or ``n`` is so small that every answer would be ``ABSTAIN``.
        UnsupportedModelError: If the pipeline cannot be smoothed, gives several answers to an input, or has a class
            that is named ``ABSTAIN``.

    Example:
        >>> import torch
        >>> from hf_certify import EncodedInput, Space, smooth_pipeline
        >>> class Line(Space):
        ...     model = torch.nn.Linear(1, 2).eval()
        ...     num_classes = 2
        ...     units = "the coordinate"
        ...     def encode(self, item, position):
        ...         return EncodedInput(torch.tensor([item]), self.model)
        >>> _ = Line.model.weight.data.copy_(torch.tensor([[-1.0], [1.0]])), Line.model.bias.data.zero_()
        >>> smoothed = smooth_pipeline(Line(), sigma=0.5, n=200)
        >>> smoothed(5.0)
        [{'label': 'LABEL_1', 'score': 1.0}, {'label': 'LABEL_0', 'score': 0.0}]
        >>> [answer[0]["label"] for answer in smoothed([-5.0, 0.0], top_k=1)]
        ['LABEL_0', 'ABSTAIN']
    """

    def __init__(
        self,
        pipe: "Pipeline | Space",
        *,
        sigma: float,
        n: int = 1000,
        alpha: float = 0.001,
        batch_size: BatchSize = "auto",
        seed: int | None = None,
    ) -> None:
        self.config = CertifyConfig(sigma=sigma, n=n, alpha=alpha, batch_size=batch_size, seed=seed)
        require_resolution(sigma, 0.0)
        # unanimous votes have the p-value 2 ** (1 - n)
        least = math.floor(-math.log2(alpha)) + 2
        if n < least:
            raise ValueError(f"n must be at least {least} for alpha={alpha!r}, got {n!r}: every answer would abstain.")
        self.pipe = pipe
        self.space = space_of(pipe)
        if self.space.outputs:
            raise UnsupportedModelError(
                f"The pipeline must give one answer to an input to be smoothed, got {self.space.outputs!r} answers."
            )
        require_eval_mode(self.space.model)
        config = getattr(pipe.model, "config", None)
        names = getattr(config, "id2label", {})
        self.labels = tuple(str(names.get(k, f"LABEL_{k}")) for k in range(self.space.num_classes))
        if ABSTAIN in self.labels:
            raise UnsupportedModelError(
                f"No class may be named {ABSTAIN!r}, which means that the smoothed classifier gives no answer: rename "
                f"it in model.config.id2label."
            )
        self._numbers = itertools.count()

    def __call__(self, inputs: Any, top_k: int | None = 5) -> Answer | list[Answer] | Iterator[Answer]:  # noqa: ANN401
        """Return the answer to one input, or those to many.

        Args:
            inputs: What the pipeline takes: one input, or a list, a tuple, a column of a dataset or a generator.
            top_k: Entries of each answer, ``>= 1``; ``None`` or more than there are classes means one for each class.

        Raises:
            ValueError: If ``top_k`` is below 1, or the noise would be rounded away beside the values of an input.
            InputImageError: If an input cannot be read as an image.
            InvalidLogitsError: If a logit is NaN or infinite.
        """
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be an int >= 1 or None, got {top_k!r}.")
        if not _are_many(inputs):
            return self._answer(inputs, 0, self._root(), top_k)
        root = self._root()
        answers = (self._answer(item, place, root, top_k) for place, item in enumerate(inputs))
        return answers if isinstance(inputs, Iterator) else list(answers)

    def predict(self, item: Any) -> Prediction:  # noqa: ANN401  whatever the pipeline takes
        """Return what ``__call__`` would answer to one input, with the votes and the p-value behind it."""
        return self._predict(item, 0, self._root())

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write model and processor as the pipeline does, and beside them ``smoothing.json`` with the settings.

        The seed is not written.

        Raises:
            UnsupportedModelError: If this was built on a space: only a pipeline can be loaded again.
            ReportFolderError: If writing fails.
        """
        if isinstance(self.pipe, Space):
            raise UnsupportedModelError(
                f"Only a smoothed transformers pipeline can be saved, got {type(self.pipe).__name__}: save its model "
                f"yourself."
            )
        self.pipe.save_pretrained(folder)
        values = {
            "schema": SMOOTHING_SCHEMA,
            "task": self.pipe.task,
            "space": self.space.units,
            "sigma": self.config.sigma,
            "n": self.config.n,
            "alpha": self.config.alpha,
            "batch_size": self.config.batch_size,
        }
        replace_file(Path(folder) / SMOOTHING_FILE, encode_report(values))

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], *, seed: int | None = None) -> "SmoothedPipeline":
        """Return the smoothed pipeline that ``save_pretrained`` wrote.

        Args:
            folder: Where it was saved.
            seed: Root of all noise, for tests.

        Raises:
            ReportFolderError: If there is no ``smoothing.json``, or not one that this version understands.
            UnsupportedModelError: If the folder holds no such pipeline, or one with another space.
        """
        values = _read_settings(Path(folder) / SMOOTHING_FILE)
        pipe = load_pipeline(os.fspath(folder), quiet=True)
        settings = {name: values[name] for name in ("sigma", "n", "alpha", "batch_size")}
        smoothed = cls(pipe, **settings, seed=seed)
        for name, found in (("task", pipe.task), ("space", smoothed.space.units)):
            if values[name] != found:
                raise UnsupportedModelError(
                    f"The pipeline must have the {name} that it was saved with, {values[name]!r}, got {found!r} in "
                    f"{str(folder)!r}."
                )
        return smoothed

    def _root(self) -> int:
        """Return the root of the noise of a call: a fresh one unless a seed was given, also in a forked process."""
        return fresh_seed() if self.config.seed is None else self.config.seed

    def _answer(self, item: Any, place: int, root: int, top_k: int | None) -> Answer:  # noqa: ANN401
        prediction = self._predict(item, place, root)
        answer: Answer = [{"label": ABSTAIN, "score": 0.0}] if prediction.label is None else []
        votes = np.array(prediction.counts)
        answer += [{"label": self.labels[k], "score": float(votes[k] / self.config.n)} for k in rank_classes(votes)]
        classes = self.space.num_classes
        return answer[: classes if top_k is None else min(top_k, classes)]

    def _predict(self, item: Any, place: int, root: int) -> Prediction:  # noqa: ANN401
        """Return the prediction for an input at a place of a call; a given seed counts inputs over all calls."""
        encoded = self.space.encode(item, place)
        check_input(encoded.x, self.config.sigma)
        rows = self.config.batch_size
        if rows == "auto":
            rows = default_batch_size(self.space.model, encoded.x.numel(), self.config.n)
        settings = CertifyConfig(sigma=self.config.sigma, n=self.config.n, batch_size=rows, seed=root)
        index = place if self.config.seed is None else next(self._numbers)
        counts = count_sample(self.space, lambda _: encoded, settings, index, Stage.PREDICTION, self.config.n)
        return Prediction.from_counts(counts, alpha=self.config.alpha)


def smooth_pipeline(
    pipe: "Pipeline | Space",
    sigma: float,
    n: int = 1000,
    alpha: float = 0.001,
    *,
    batch_size: BatchSize = "auto",
    seed: int | None = None,
) -> SmoothedPipeline:
    """Return the smoothed classifier of a pipeline, to be called in its place; see ``SmoothedPipeline``.

    Args:
        pipe: Pipeline with a model in evaluation mode, or a space.
        sigma: Standard deviation of the noise: that of the certificates.
        n: Votes for each answer, ``>= 1``.
        alpha: Failure probability of each answer, in ``(0, 1)``.
        batch_size: Rows of every forward pass, ``>= 1``, or ``auto``.
        seed: Root of all noise, for tests.

    Example:
        >>> from PIL import Image
        >>> from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil, pipeline
        >>> settings = ViTConfig(image_size=8, patch_size=4, hidden_size=8, intermediate_size=8, num_attention_heads=1,
        ...                      num_hidden_layers=1, num_labels=3)
        >>> pipe = pipeline("image-classification", model=ViTForImageClassification(settings).eval(),
        ...                 image_processor=ViTImageProcessorPil(size={"height": 8, "width": 8}))
        >>> smoothed = smooth_pipeline(pipe, sigma=0.25, n=100)
        >>> len(smoothed(Image.new("RGB", (9, 9)), top_k=2))
        2
    """
    return SmoothedPipeline(pipe, sigma=sigma, n=n, alpha=alpha, batch_size=batch_size, seed=seed)


def _are_many(inputs: Any) -> bool:  # noqa: ANN401  whatever the pipeline takes
    """Return whether a call is about several inputs, as the pipelines of transformers decide it."""
    if isinstance(inputs, str | bytes | os.PathLike | Mapping | np.ndarray | torch.Tensor):
        return False
    # datasets of torch have no __iter__
    return hasattr(inputs, "__iter__") or hasattr(inputs, "__getitem__")


def _read_settings(path: Path) -> dict[str, Any]:
    """Return the values that ``save_pretrained`` wrote.

    Raises:
        ReportFolderError: If they cannot be read, or are not what this version writes.
    """
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ReportFolderError(f"A smoothed pipeline must have a readable {SMOOTHING_FILE}: {error}.") from error
    if not isinstance(values, dict) or values.keys() != _KEYS or values["schema"] != SMOOTHING_SCHEMA:
        raise ReportFolderError(
            f"{str(path)!r} must hold the keys {sorted(_KEYS)} with schema {SMOOTHING_SCHEMA}, got {values!r}: "
            f"read it with the version of the package that wrote it."
        )
    return values
