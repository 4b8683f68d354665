"""Certification of a pipeline in one call."""

import dataclasses
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from hf_certify.bounds import require_certifiable
from hf_certify.certificate import Certificate
from hf_certify.config import BatchSize, CertifyConfig, IntervalName, MarginOption
from hf_certify.errors import UnsupportedModelError
from hf_certify.journal import HEADER_FILE, read_header
from hf_certify.noise import fresh_seed, require_resolution
from hf_certify.processes import Processes
from hf_certify.provenance import machine_facts, model_facts, run_info
from hf_certify.report import CertificationReport, check_labels
from hf_certify.runner import Votes, count_all
from hf_certify.sampling import default_batch_size
from hf_certify.smoothing import check_input
from hf_certify.spaces import space_of
from hf_certify.spaces.base import Space
from hf_certify.storage import encode_report

if TYPE_CHECKING:
    from transformers import Pipeline


def certify_pipeline(
    pipe: "Pipeline | Space",
    inputs: Iterable[Any],
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
    resume: str | os.PathLike[str] | None = None,
) -> CertificationReport:
    """Return certificates for the smoothed version of a classifier pipeline.

    The guarantee is for the smoothed classifier, in the units of the space that ``report.facts["space"]`` names; each
    certificate is wrong with probability at most ``alpha``. All inputs are read and checked before the first draw.
    Costs ``n0 + n`` forward rows for each input. Processes that ``accelerate launch`` starts share the inputs; each
    returns the whole report.

    Args:
        pipe: Pipeline with a model in evaluation mode: image-classification, with a processor of the ``pil`` backend.
            Or a ``Space`` of your own.
        inputs: What the pipeline takes; a list, a generator, or a column of a ``datasets.Dataset``. For images paths,
            PIL images or uint8 arrays. A sequence is read three times, anything else is first put into a list.
        sigma: Standard deviation of the noise, at least ``2**-12``, in the units of the space.
        n0: Draws that pick the class, ``>= 1``.
        n: Independent draws that give the bounds, ``>= 1``.
        alpha: Failure probability of each certificate, in ``(0, 1)``.
        interval: Rule for the bounds, see ``CertifyConfig``.
        margin: ``auto``, ``mono`` or ``multi``, see ``CertifyConfig``.
        batch_size: Rows of every forward pass, ``>= 1``, or ``auto``: by the size of the model.
        seed: Root of all noise, in ``[0, 2**128)``, chosen independently of model and inputs. ``None`` draws 128 bits
            from the operating system; the report holds them.
        progress: Whether to show a bar that counts draws.
        resume: Folder for a journal of votes. If there is one in it already, of the same inputs, settings and machine,
            its votes are not counted again: a run that was interrupted goes on, and ends with the same report.

    Raises:
        TypeError: If ``pipe`` is not a pipeline, or ``inputs``, one of them, or a setting is of the wrong kind.
        ValueError: If ``inputs`` is empty, a setting is out of range, or ``n`` is too small to certify anything.
        UnsupportedModelError: If the pipeline has another task, fewer than 2 classes, or a module in training mode.
        UnsupportedProcessorError: If the processor cannot be undone.
        InputImageError: If an input cannot be read as an image, or does not fit the model.
        InvalidLogitsError: If a logit is NaN or infinite.
        JournalError: If the folder belongs to another run, is damaged, or is in use.
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
    # whatever the inputs are, there is less noise than this only where float32 keeps none of it
    require_resolution(sigma, 0.0)
    space, processes = space_of(pipe), Processes.current()
    require_certifiable(alpha, n, interval=interval, margin=config.resolved_margin, num_classes=space.num_classes)
    items = as_sequence(inputs, space.array_ndim)
    shapes, digests = _examined(space, items, sigma)
    config = dataclasses.replace(
        config,
        seed=_seed(seed, resume, processes),
        batch_size=default_batch_size(space.model, max(map(math.prod, shapes)), max(n0, n))
        if batch_size == "auto"
        else batch_size,
    )
    facts = {
        "input_shapes": sorted(map(list, shapes)),
        "inputs_sha256": digests,
        **space.facts(),
        **model_facts(space.model),
        **machine_facts(space.device),
    }
    _require_storable(CertificationReport(certificates=(), config=config, facts=facts), space.num_classes)
    begun = time.perf_counter()
    with tqdm(
        total=len(range(processes.rank, len(items), processes.count)) * (n0 + n),
        unit="draw",
        unit_scale=True,
        disable=not progress or processes.rank > 0,
    ) as bar:
        votes = count_all(
            space,
            lambda position: space.encode(items[position], position),
            len(items),
            config,
            processes=processes,
            journal=resume,
            header={"config": config.to_dict(), "facts": facts},
            on_draws=bar.update,
        )
    report = CertificationReport(certificates=_certificates(space, items, votes, config), config=config, facts=facts)
    report.run_info.update(run_info(time.perf_counter() - begun, len(items) * (n0 + n), processes.count))
    return report


def _examined(space: Space, items: Sequence[Any], sigma: float) -> tuple[set[tuple[int, ...]], list[str]]:
    """Return the shapes and digests of all inputs: a bad one must not cost the draws of the others."""
    shapes, digests = set(), []
    for position in range(len(items)):
        encoded = space.encode(items[position], position)
        check_input(encoded.x, sigma)
        shapes.add(tuple(encoded.x.shape))
        digests.append(encoded.digest())
    return shapes, digests


def _certificates(
    space: Space, items: Sequence[Any], votes: Mapping[int, tuple[Votes, Votes]], config: CertifyConfig
) -> tuple[Certificate, ...]:
    """Return what the votes of all inputs prove, input by input and answer by answer."""
    found = []
    for position in range(len(items)):
        encoded = space.encode(items[position], position)
        selection, estimation = (sample.reshape(-1, space.num_classes).tolist() for sample in votes[position])
        for output in range(len(estimation)):
            place = output if space.outputs else None
            found.append(
                space.certificate(encoded, selection[output], estimation[output], config, index=position, output=place)
            )
    return tuple(found)


def _seed(seed: int | None, resume: str | os.PathLike[str] | None, processes: Processes) -> int:
    """Return the root of all noise: the one given, that of the run that is continued, or one fresh for everybody."""
    if seed is not None:
        return seed
    root = 0
    # process 0 decides for all: another may look when the header of this run is already there
    if processes.rank == 0:
        continued = resume is not None and (Path(resume) / HEADER_FILE).exists()
        root = int(read_header(resume)["config"]["seed"]) if resume is not None and continued else fresh_seed()
    return int(processes.from_first(root))


def _require_storable(empty: CertificationReport, num_classes: int) -> None:
    """Raise unless the report can be saved and loaded once it holds certificates: draws must not be made in vain."""
    encode_report(empty.to_dict())
    try:
        check_labels(empty.facts, num_classes)
    except ValueError as error:
        raise UnsupportedModelError(f"{error} Set model.config.id2label to {{0: ..., 1: ..., ...}}.") from error


def as_sequence(inputs: Iterable[Any], array_ndim: int) -> Sequence[Any]:
    """Return ``inputs`` with a length and an index, after checking that it is a collection of inputs."""
    if isinstance(inputs, str | bytes | os.PathLike | Mapping) or not isinstance(inputs, Iterable):
        raise TypeError(
            f"inputs must be a list, a generator or a column of a dataset, got {type(inputs).__name__}: wrap a single "
            f"input in a list."
        )
    if isinstance(inputs, np.ndarray) and inputs.ndim <= array_ndim:
        raise TypeError(
            f"inputs must be a list of inputs, got one array of shape {list(inputs.shape)}: its rows would be taken "
            f"for inputs; wrap a single input in a list."
        )
    if hasattr(inputs, "column_names"):
        raise TypeError(
            f"inputs must be a column, got a whole {type(inputs).__name__}: pass a column of it, such as "
            f"dataset['image']."
        )
    # what a column decodes lazily stays on disk; other things with an index may count from a label of their own
    items = inputs if isinstance(inputs, Sequence) else list(inputs)
    if len(items) == 0:
        raise ValueError("inputs must hold at least one input, got none.")
    return items
