"""Image-classification pipelines as functions of raw pixels in [0, 1] at model resolution.

The pipeline's own processor prepares each image. What it does after resizing and cropping is undone: rescaling
and normalising are one affine map for each channel, ``pixel_values = raw * scale + shift``, and that map becomes part
of the model. Noise is added to ``raw``, so sigma and radius mean the same for every processor.
"""

import json
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor, nn

from hf_certify.errors import InputImageError, UnsupportedModelError, UnsupportedProcessorError
from hf_certify.sampling import require_eval_mode
from hf_certify.spaces.base import EncodedInput, Space

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, ImageClassificationPipeline

ImageInput = str | os.PathLike[str] | Image.Image | NDArray[np.uint8]

# float32 arithmetic in another order stays within a few ulp of this
_AFFINE_TOLERANCE = 1e-5

# numbers of channels that image processors look for at either end of a shape
_CHANNEL_COUNTS = frozenset({1, 3, 4})


class RawPixelModel(nn.Module):
    """The model as a function of raw pixels: normalise, run, return the logits.

    Args:
        model: Image classifier of transformers; takes ``pixel_values`` and returns an object with ``logits``, as many
            as its ``config.num_labels``.
        scale: `[C, 1, 1]` float32 factor for each channel.
        shift: `[C, 1, 1]` float32 offset for each channel.
    """

    def __init__(self, model: nn.Module, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.model = model
        self.scale = nn.Buffer(scale, persistent=False)
        self.shift = nn.Buffer(shift, persistent=False)
        # a new module is in training mode; the mode that counts is that of the model inside
        self.training = model.training

    def normalize(self, raw: Tensor) -> Tensor:
        """Return ``pixel_values`` `[..., C, H, W]` of raw pixels `[..., C, H, W]`, both float32."""
        return torch.addcmul(self.shift, raw, self.scale)

    def forward(self, raw: Tensor) -> Tensor:
        """Return logits `[B, K]` of raw pixels `[B, C, H, W]`, in the dtype of the model.

        Raises:
            UnsupportedModelError: If the model returns no object with logits, or not ``config.num_labels`` of them.
        """
        dtype = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), raw.dtype)
        output = self.model(pixel_values=self.normalize(raw).to(dtype))
        logits = getattr(output, "logits", None)
        if not isinstance(logits, Tensor):
            raise UnsupportedModelError(
                f"The model must return an object with logits, got {type(output).__name__}: set "
                f"model.config.return_dict = True."
            )
        declared = self.model.config.num_labels  # type: ignore[union-attr]
        if logits.shape != (len(raw), declared):
            raise UnsupportedModelError(
                f"The model must return as many logits as config.num_labels={declared!r} for each image, got shape "
                f"{list(logits.shape)} for {len(raw)} images: set config.num_labels to the width of the head."
            )
        return logits


class ImageSpace(Space):
    """A pipeline taken apart: ``encode`` gives raw pixels, ``model`` the logits of raw pixels.

    Args:
        pipe: Image-classification pipeline of transformers with a model in evaluation mode. Not modified.

    Raises:
        TypeError: If ``pipe`` is not a pipeline.
        UnsupportedModelError: If the task is another, or the model has one class, several labels for an image, or a
            module in training mode.
        UnsupportedProcessorError: If the processor does not use the ``pil`` backend, its settings cannot be undone, or
            it does more than rescale and normalise to an image that holds every 8-bit value.
    """

    model: RawPixelModel
    units = "raw pixels in [0, 1] at model resolution"
    array_ndim = 3

    def __init__(self, pipe: "ImageClassificationPipeline") -> None:
        _require_image_classification(pipe)
        require_eval_mode(pipe.model)
        self.processor = pipe.image_processor
        self.num_classes = int(pipe.model.config.num_labels)
        self.channels: int | None = getattr(pipe.model.config, "num_channels", None)
        scale, shift = _affine_map(self.processor)
        self.model = RawPixelModel(pipe.model, scale.to(pipe.model.device), shift.to(pipe.model.device))
        self._check_processor(len(scale))

    def encode(self, image: ImageInput, position: int) -> EncodedInput:
        """Return the raw pixels of one image, as the pipeline's processor resizes and crops it.

        Args:
            image: Path, PIL image, or uint8 array `[H, W]`, `[H, W, C]` or `[C, H, W]`. Files, PIL images and `[H, W]`
                become RGB as in the pipeline, except that a model with ``num_channels=1`` in its config
                gets them in gray.
            position: Place among the inputs, for messages.

        Returns:
            ``x`` is `[C, H, W]` float32 in ``[0, 1]`` on the device of the model: 8-bit values divided by 255. The
            source is the path, of an image that is given by one.

        Raises:
            TypeError: If ``image`` is of another kind.
            InputImageError: If it cannot be read or does not fit the model.
            UnsupportedProcessorError: If the processor does more than rescale and normalise after resizing and
                cropping.
        """
        loaded = _load(image, position, gray=self.channels == 1)
        bytes_, pixel_values = self._process(loaded, f"Input {position}")
        if self.channels is not None and bytes_.shape[0] != self.channels:
            raise InputImageError(
                f"Input {position} must give {self.channels} channels for this model, got {bytes_.shape[0]}: convert "
                f"the image, e.g. with image.convert('RGB')."
            )
        source = os.fsdecode(image) if isinstance(image, str | os.PathLike) else None
        return EncodedInput(self._raw(bytes_, pixel_values, f"input {position}"), self.model, source=source)

    def _check_processor(self, mean_values: int) -> None:
        """Push an image that holds every 8-bit value in every channel through the processor."""
        channels = self.channels or mean_values
        if mean_values not in (1, channels):
            raise UnsupportedProcessorError(
                f"image_mean and image_std must hold 1 or {channels} values for a model of {channels} channels, got "
                f"{mean_values}: set them in the processor."
            )
        # a model that does not say how many channels it has may take either
        modes = ["L"] if self.channels == 1 else ["RGB"] if self.channels or mean_values > 1 else ["RGB", "L"]
        for mode in modes:
            try:
                processed = self._process(Image.fromarray(_probe(mode)), "A test image")
            except InputImageError as error:
                if mode != modes[-1]:
                    continue
                raise UnsupportedProcessorError(f"{error} Give model and processor the same channels.") from error
            self._raw(*processed, "an image of all 8-bit values")
            return

    def _raw(self, bytes_: Tensor, pixel_values: Tensor, name: str) -> Tensor:
        """Return raw pixels, after checking that the processor made ``pixel_values`` of them by its affine map."""
        if bytes_.shape != pixel_values.shape:
            raise UnsupportedProcessorError(
                f"The processor must only rescale and normalise after resizing and cropping, got "
                f"{type(self.processor).__name__}, which makes {list(pixel_values.shape)} of {list(bytes_.shape)}: "
                f"build the pipeline with a processor such as ViTImageProcessorPil."
            )
        raw = (bytes_ / 255).to(self.device)
        error = (self.model.normalize(raw) - pixel_values.to(self.device)).abs()
        # also catches NaN, which compares false
        if not bool((error <= _AFFINE_TOLERANCE * (self.model.scale.abs() + self.model.shift.abs())).all()):
            raise UnsupportedProcessorError(
                f"The processor must only rescale and normalise after resizing and cropping, got "
                f"{type(self.processor).__name__}, whose pixel_values for {name} differ from that by up to "
                f"{float(error.max()):.3g}: build the pipeline with a processor such as ViTImageProcessorPil."
            )
        return raw

    def facts(self) -> dict[str, Any]:
        """Return what identifies the processing, as plain values."""
        return {
            **super().facts(),
            "processor": type(self.processor).__name__,
            "processor_backend": self.processor.backend,
            "processor_config": json.loads(self.processor.to_json_string()),
        }

    def _process(self, image: Image.Image | NDArray[np.uint8], name: str) -> tuple[Tensor, Tensor]:
        """Return the processor's output before and after rescaling and normalising, each `[C, H, W]` float32."""
        try:
            before = self.processor(images=image, do_rescale=False, do_normalize=False, return_tensors="pt")
            after = self.processor(images=image, return_tensors="pt")
        except Exception as error:
            raise InputImageError(f"{name} must fit the image processor, which says: {error}") from error
        for output in (before, after):
            if set(output) != {"pixel_values"} or output["pixel_values"].ndim != 4 or len(output["pixel_values"]) != 1:
                raise UnsupportedProcessorError(
                    f"The processor must give one tensor of pixel_values for an image, got {sorted(output)!r} from "
                    f"{type(self.processor).__name__}: models that read several crops or masks are not supported."
                )
        return before["pixel_values"][0].float(), after["pixel_values"][0].float()


def _require_image_classification(pipe: "ImageClassificationPipeline") -> None:
    config = pipe.model.config
    if getattr(config, "return_dict", True) is False:
        raise UnsupportedModelError(
            "The model must return an object with logits, got return_dict=False: set model.config.return_dict = True."
        )
    if config.num_labels < 2:
        raise UnsupportedModelError(
            f"The model must have at least 2 classes, got num_labels={config.num_labels!r}: there is no other class "
            f"that a perturbation could reach."
        )
    if config.problem_type not in (None, "single_label_classification"):
        raise UnsupportedModelError(
            f"The model must give one label for an image, got problem_type={config.problem_type!r}: its smoothed "
            f"argmax is not what the pipeline predicts."
        )


def _affine_map(processor: "BaseImageProcessor") -> tuple[Tensor, Tensor]:
    """Return ``(scale, shift)``, each `[C, 1, 1]` or `[1, 1, 1]`, with ``pixel_values = raw * scale + shift``.

    The processor computes ``(image * factor - mean) / std`` of 8-bit values, and ``raw`` is ``image / 255``.
    """
    backend = getattr(processor, "backend", None)
    if backend != "pil":
        raise UnsupportedProcessorError(
            f"The image processor must use the 'pil' backend, got {backend!r} from {type(processor).__name__}: load "
            f"it with AutoImageProcessor.from_pretrained(..., backend='pil')."
        )
    declared: tuple[Any, Any, Any] = (
        processor.rescale_factor if processor.do_rescale else 1.0,
        processor.image_mean if processor.do_normalize else 0.0,
        processor.image_std if processor.do_normalize else 1.0,
    )
    try:
        factor, mean, std = np.broadcast_arrays(*(np.atleast_1d(np.asarray(v, np.float64)) for v in declared))
        usable = mean.ndim == 1 and np.all(np.isfinite([factor, mean, std])) and np.all((factor > 0) & (std > 0))
    except (TypeError, ValueError):
        # no number at all, or lists of unlike lengths
        usable = False
    if not usable:
        raise UnsupportedProcessorError(
            f"rescale_factor and image_std must be finite and > 0, image_mean and image_std of one length, got "
            f"rescale_factor={processor.rescale_factor!r}, image_mean={processor.image_mean!r}, "
            f"image_std={processor.image_std!r}: the pixels could not be recovered."
        )
    scale, shift = 255 * factor / std, -mean / std
    return tuple(torch.tensor(part[:, None, None], dtype=torch.float32) for part in (scale, shift))  # type: ignore[return-value]


def _load(image: ImageInput, position: int, *, gray: bool) -> Image.Image | NDArray[np.uint8]:
    """Return one input as the processor takes it: PIL images, files and flat arrays as RGB or gray."""
    if isinstance(image, str | os.PathLike):
        name = os.fsdecode(image)
        if os.path.isdir(image):
            raise InputImageError(
                f"Input {position} must be a readable image file, got the folder {name!r}: pass the files in it: "
                f"sorted(Path({name!r}).glob('*.png'))."
            )
        try:
            with Image.open(image) as opened:
                return _convert(opened, gray)
        # a broken file may raise anything, such as SyntaxError or DecompressionBombError
        except Exception as error:
            raise InputImageError(f"Input {position} must be a readable image file, got {name!r}: {error}") from error
    if isinstance(image, Image.Image):
        try:
            return _convert(image, gray)
        # an image opened from a file reads its pixels only now
        except Exception as error:
            name = getattr(image, "filename", "") or type(image).__name__
            raise InputImageError(f"Input {position} must be a readable image, got {name!r}: {error}") from error
    if isinstance(image, np.ndarray) and image.dtype == np.uint8:
        if image.ndim not in (2, 3) or image.size == 0:
            raise InputImageError(
                f"Input {position} must have shape [H, W], [H, W, C] or [C, H, W], got {list(image.shape)}."
            )
        if image.ndim == 3 and {image.shape[0], image.shape[-1]} <= _CHANNEL_COUNTS:
            raise InputImageError(
                f"Input {position} must have one dimension that can only be that of the channels, got shape "
                f"{list(image.shape)}, which can be read in two ways: convert with Image.fromarray."
            )
        return _convert(Image.fromarray(image), gray) if image.ndim == 2 else image
    kind = f"an array of {image.dtype}" if isinstance(image, np.ndarray) else type(image).__name__
    raise TypeError(
        f"Input {position} must be a path, a PIL image or a uint8 array, got {kind}: 8-bit values fix what raw pixels "
        f"in [0, 1] are; for a datasets.Dataset pass its image column."
    )


def _probe(mode: str) -> NDArray[np.uint8]:
    """Return an image `[256, 256, 3]`, or `[256, 256]` for mode ``L``, with every 8-bit value in every channel."""
    rows, columns = np.mgrid[:256, :256]
    # two full waves in each row, so that a crop keeps one; their clipped tops keep 0 and 255 when resizing blurs
    phase = (columns + rows / 32) / 128
    waves = [335 * np.abs(2 * ((phase + shift) % 1) - 1) - 40 for shift in (0, 1 / 3, 2 / 3)]
    values = np.clip(np.round(np.stack(waves, axis=-1)), 0, 255).astype(np.uint8)
    return values if mode == "RGB" else values[..., 0]


def _convert(image: Image.Image, gray: bool) -> Image.Image:
    """Return the image as RGB or gray, the orientation tag applied as in the pipeline."""
    return ImageOps.exif_transpose(image).convert("L" if gray else "RGB")
