"""Certification of a pipeline in one call."""

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from tqdm.auto import tqdm

from hf_certify.bounds import require_certifiable
from hf_certify.config import BatchSize, CertifyConfig, IntervalName, MarginOption
from hf_certify.errors import UnsupportedModelError
from hf_certify.noise import fresh_seed, require_resolution
from hf_certify.provenance import machine_facts, model_facts
from hf_certify.report import CertificationReport, check_labels
from hf_certify.sampling import default_batch_size
from hf_certify.smoothing import SmoothedClassifier
from hf_certify.spaces.image import ImageInput, ImageSpace
from hf_certify.storage import encode_report

if TYPE_CHECKING:
    from transformers import ImageClassificationPipeline


def certify_pipeline(
    pipe: "ImageClassificationPipeline",
    inputs: Iterable[ImageInput],
    *,
    sigma: float,
    n0: int = 100,
    n: int = 100_000,
    alpha: float = 0.001,
    interval: IntervalName = "max_upper",
    margin: MarginOption = "auto",
    batch_size: BatchSize = "auto",
    seed: int | None = None,
    progress: bool = True,
) -> CertificationReport:
    """Return certificates for the smoothed version of an image-classification pipeline.

    The guarantee is for the smoothed classifier at model resolution, in raw pixels of ``[0, 1]``; each certificate is
    wrong with probability at most ``alpha``. All inputs are read and checked before the first draw. Costs ``n0 + n``
    forward rows for each input.

    Args:
        pipe: Image-classification pipeline with a processor of the ``pil`` backend and a model in evaluation mode.
        inputs: Paths, PIL images or uint8 arrays; a list, a generator, or an image column of a ``datasets.Dataset``. A
            sequence is read twice, anything else is first put into a list.
        sigma: Standard deviation of the noise, at least ``2**-12``, in raw pixel units.
        n0: Draws that pick the class, ``>= 1``.
        n: Independent draws that give the bounds, ``>= 1``.
        alpha: Failure probability of each certificate, in ``(0, 1)``.
        interval: Rule for the bounds, see ``CertifyConfig``.
        margin: ``auto``, ``mono`` or ``multi``, see ``CertifyConfig``.
        batch_size: Rows of every forward pass, ``>= 1``, or ``auto``: by the size of the model.
        seed: Root of all noise, in ``[0, 2**128)``, chosen independently of model and inputs. ``None`` draws 128 bits
            from the operating system; the report holds them.
        progress: Whether to show a bar that counts draws.

    Raises:
        TypeError: If ``pipe`` is not a pipeline, or ``inputs``, one of them, or a setting is of the wrong kind.
        ValueError: If ``inputs`` is empty, a setting is out of range, or ``n`` is too small to certify anything.
        UnsupportedModelError: If the pipeline has another task, fewer than 2 classes, or a module in training mode.
        UnsupportedProcessorError: If the processor cannot be undone.
        InputImageError: If an input cannot be read as an image, or does not fit the model.
        InvalidLogitsError: If a logit is NaN or infinite.
        ReportFolderError: If the report could not be saved, because what identifies model or processor is not plain.

    Example:
        >>> from PIL import Image
        >>> from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil, pipeline
        >>> settings = ViTConfig(image_size=8, patch_size=4, hidden_size=8, intermediate_size=8, num_attention_heads=1,
        ...                      num_hidden_layers=1, num_labels=3)
        >>> pipe = pipeline("image-classification", model=ViTForImageClassification(settings).eval(),
        ...                 image_processor=ViTImageProcessorPil(size={"height": 8, "width": 8}))
        >>> report = certify_pipeline(pipe, [Image.new("RGB", (9, 9))], sigma=0.25, n=200, seed=0, progress=False)
        >>> report.verify()
        >>> report.draws_per_input
        300
    """
    config = CertifyConfig(
        sigma=sigma, n0=n0, n=n, alpha=alpha, interval=interval, margin=margin, batch_size=batch_size, seed=seed
    )
    # raw pixels lie in [0, 1]
    require_resolution(sigma, 1.0)
    space = ImageSpace(pipe)
    require_certifiable(alpha, n, interval=interval, margin=config.resolved_margin, num_classes=space.num_classes)
    images = _as_sequence(inputs)
    # one pass over all inputs before the first draw: a bad one must not cost the work on the others
    shapes = {tuple(space.encode(images[position], position).shape) for position in range(len(images))}
    largest = max(map(math.prod, shapes))
    config = dataclasses.replace(
        config,
        seed=fresh_seed() if seed is None else seed,
        batch_size=default_batch_size(pipe.model, largest, max(n0, n)) if batch_size == "auto" else batch_size,
    )
    smoothed = SmoothedClassifier(
        space.model, sigma=sigma, num_classes=space.num_classes, batch_size=config.batch_size, seed=config.seed
    )
    facts = {
        "input_shapes": sorted(map(list, shapes)),
        **space.facts(),
        **model_facts(pipe.model),
        **machine_facts(space.device),
    }
    _require_storable(CertificationReport(certificates=(), config=config, facts=facts), space.num_classes)
    with tqdm(total=len(images) * (n0 + n), unit="draw", unit_scale=True, disable=not progress) as bar:
        certificates = tuple(
            smoothed.certify(
                space.encode(images[position], position),
                n0=n0,
                n=n,
                alpha=alpha,
                interval=interval,
                margin=margin,
                index=position,
                source=_source(images[position]),
                on_draws=bar.update,
            )
            for position in range(len(images))
        )
    return CertificationReport(certificates=certificates, config=config, facts=facts)


def _require_storable(empty: CertificationReport, num_classes: int) -> None:
    """Raise unless the report can be saved and loaded once it holds certificates: draws must not be made in vain."""
    encode_report(empty.to_dict())
    try:
        check_labels(empty.facts, num_classes)
    except ValueError as error:
        raise UnsupportedModelError(f"{error} Set model.config.id2label to {{0: ..., 1: ..., ...}}.") from error


def _as_sequence(inputs: Iterable[ImageInput]) -> Sequence[ImageInput]:
    """Return ``inputs`` with a length and an index, after checking that it is a collection of inputs."""
    if isinstance(inputs, str | bytes | os.PathLike | Mapping) or not isinstance(inputs, Iterable):
        raise TypeError(
            f"inputs must be a list, a generator or an image column, got {type(inputs).__name__}: wrap a single "
            f"image in a list."
        )
    if isinstance(inputs, np.ndarray) and inputs.ndim < 4:
        raise TypeError(
            f"inputs must be a list of images, got one array of shape {list(inputs.shape)}: its rows would be taken "
            f"for images; wrap a single image in a list."
        )
    if hasattr(inputs, "column_names"):
        raise TypeError(
            f"inputs must be an image column, got a whole {type(inputs).__name__}: pass its image column, such as "
            f"dataset['image']."
        )
    # images of a lazily decoded column stay on disk; other things with an index may count from a label of their own
    images = inputs if isinstance(inputs, Sequence) else list(inputs)
    if len(images) == 0:
        raise ValueError("inputs must hold at least one image, got none.")
    return images


def _source(image: ImageInput) -> str | None:
    """Return the path of an input that is one."""
    return os.fsdecode(image) if isinstance(image, str | os.PathLike) else None
