"""Certification of a pipeline in one call."""

import dataclasses
import hashlib
import importlib.metadata
import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm.auto import tqdm

from hf_certify.bounds import require_certifiable
from hf_certify.config import BatchSize, CertifyConfig, IntervalName, MarginOption
from hf_certify.noise import NOISE_SCHEMA, fresh_seed
from hf_certify.report import CertificationReport
from hf_certify.sampling import default_batch_size
from hf_certify.smoothing import SmoothedClassifier
from hf_certify.spaces.image import ImageInput, ImageSpace

if TYPE_CHECKING:
    from transformers import ImageClassificationPipeline, PreTrainedModel

_DISTRIBUTIONS = ("hf-chain-highway-certify", "torch", "transformers", "numpy", "scipy", "pillow")


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
        sigma: Standard deviation of the noise, ``> 0``, in raw pixel units.
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
    facts = {
        "input_shapes": sorted(map(list, shapes)),
        **space.facts(),
        **_model_facts(pipe.model),
        **_machine_facts(space.device),
    }
    return CertificationReport(certificates=certificates, config=config, facts=facts)


def _as_sequence(inputs: Iterable[ImageInput]) -> Sequence[ImageInput]:
    """Return ``inputs`` with a length and an index, after checking that it is a collection of inputs."""
    if isinstance(inputs, str | bytes | os.PathLike | Mapping) or not isinstance(inputs, Iterable):
        raise TypeError(
            f"inputs must be a list, a generator or an image column, got {type(inputs).__name__}: wrap a single "
            f"image in a list."
        )
    # images of a lazily decoded column stay on disk; a generator can be read only once
    indexable = hasattr(inputs, "__len__") and hasattr(inputs, "__getitem__")
    images: Sequence[ImageInput] = inputs if indexable else list(inputs)  # type: ignore[assignment]
    if len(images) == 0:
        raise ValueError("inputs must hold at least one image, got none.")
    return images


def _source(image: ImageInput) -> str | None:
    """Return the path of an input that is one."""
    return os.fspath(image) if isinstance(image, str | os.PathLike) else None


def _model_facts(model: "PreTrainedModel") -> dict[str, Any]:
    """Return what identifies the model: class, name, labels, dtype, and a SHA-256 of the weights."""
    return {
        "model": type(model).__name__,
        "model_name": model.config._name_or_path,
        "labels": {str(index): name for index, name in sorted(model.config.id2label.items())},
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights_sha256": _weights_hash(model),
    }


def _weights_hash(model: nn.Module) -> str:
    """Return the SHA-256 of all parameters and buffers with their names, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _machine_facts(device: torch.device) -> dict[str, Any]:
    """Return what votes on a decision boundary may depend on through floating-point rounding."""
    return {
        "device": str(device),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "noise_schema": NOISE_SCHEMA,
        "versions": {"python": platform.python_version(), **_versions()},
    }


def _versions() -> dict[str, str]:
    """Return the version of each installed distribution that has a part in the result."""
    found = {}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            # a checkout on the path has no metadata of its own
            found[name] = "not installed"
    return found
