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

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, ImageClassificationPipeline

ImageInput = str | os.PathLike[str] | Image.Image | NDArray[np.uint8]

# float32 arithmetic in another order stays within a few ulp of this
_AFFINE_TOLERANCE = 1e-5


class RawPixelModel(nn.Module):
    """The model as a function of raw pixels: normalise, run, return the logits.

    Args:
        model: Image classifier of transformers; takes ``pixel_values`` and returns an object with ``logits``.
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
        """Return logits `[B, K]` of raw pixels `[B, C, H, W]`, in the dtype of the model."""
        dtype = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), raw.dtype)
        logits: Tensor = self.model(pixel_values=self.normalize(raw).to(dtype)).logits
        return logits


class ImageSpace:
    """A pipeline taken apart: ``encode`` gives raw pixels, ``model`` the logits of raw pixels.

    Args:
        pipe: Image-classification pipeline of transformers with a model in evaluation mode. Not modified.

    Raises:
        TypeError: If ``pipe`` is not a pipeline.
        UnsupportedModelError: If the task is another, or the model has one class, several labels for an image, or a
            module in training mode.
        UnsupportedProcessorError: If the processor does not use the ``pil`` backend, or its settings cannot be undone.
    """

    def __init__(self, pipe: "ImageClassificationPipeline") -> None:
        _require_image_classification(pipe)
        require_eval_mode(pipe.model)
        self.processor = pipe.image_processor
        self.num_classes = int(pipe.model.config.num_labels)
        self.channels: int | None = getattr(pipe.model.config, "num_channels", None)
        scale, shift = _affine_map(self.processor)
        self.model = RawPixelModel(pipe.model, scale.to(pipe.model.device), shift.to(pipe.model.device))
        self.device = torch.device(pipe.model.device)

    def encode(self, image: ImageInput, position: int) -> Tensor:
        """Return the raw pixels of one image, as the pipeline's processor resizes and crops it.

        Args:
            image: Path, PIL image, or uint8 array `[H, W]`, `[H, W, C]` or `[C, H, W]`. Files, PIL images and `[H, W]`
                become RGB as in the pipeline, except that a model with ``num_channels=1`` in its config
                gets them in gray.
            position: Place among the inputs, for messages.

        Returns:
            `[C, H, W]` float32 in ``[0, 1]`` on the device of the model: 8-bit values divided by 255.

        Raises:
            TypeError: If ``image`` is of another kind.
            InputImageError: If it cannot be read or does not fit the model.
            UnsupportedProcessorError: If the processor does more than rescale and normalise after resizing and
                cropping.
        """
        loaded = _load(image, position, gray=self.channels == 1)
        bytes_, pixel_values = self._process(loaded, position)
        if self.channels is not None and bytes_.shape[0] != self.channels:
            raise InputImageError(
                f"Input {position} must give {self.channels} channels for this model, got {bytes_.shape[0]}: convert "
                f"the image, e.g. with image.convert('RGB')."
            )
        raw = (bytes_ / 255).to(self.device)
        error = (self.model.normalize(raw) - pixel_values.to(self.device)).abs()
        # also catches NaN, which compares false
        if not bool((error <= _AFFINE_TOLERANCE * (self.model.scale.abs() + self.model.shift.abs())).all()):
            raise UnsupportedProcessorError(
                f"The processor must only rescale and normalise after resizing and cropping, got "
                f"{type(self.processor).__name__}, whose pixel_values for input {position} differ from that by up to "
                f"{float(error.max()):.3g}: build the pipeline with a processor such as ViTImageProcessorPil."
            )
        return raw

    def facts(self) -> dict[str, Any]:
        """Return what identifies the processing, as plain values."""
        return {
            "space": "raw pixels in [0, 1] at model resolution",
            "norm": "l2",
            "processor": type(self.processor).__name__,
            "processor_backend": self.processor.backend,
            "processor_config": json.loads(self.processor.to_json_string()),
        }

    def _process(self, image: Image.Image | NDArray[np.uint8], position: int) -> tuple[Tensor, Tensor]:
        """Return the processor's output before and after rescaling and normalising, each `[C, H, W]` float32."""
        try:
            before = self.processor(images=image, do_rescale=False, do_normalize=False, return_tensors="pt")
            after = self.processor(images=image, return_tensors="pt")
        except ValueError as error:
            raise InputImageError(f"Input {position} must fit the image processor, which says: {error}") from error
        for output in (before, after):
            if set(output) != {"pixel_values"} or output["pixel_values"].ndim != 4 or len(output["pixel_values"]) != 1:
                raise UnsupportedProcessorError(
                    f"The processor must give one tensor of pixel_values for an image, got {sorted(output)!r} from "
                    f"{type(self.processor).__name__}: models that read several crops or masks are not supported."
                )
        return before["pixel_values"][0].float(), after["pixel_values"][0].float()


def _require_image_classification(pipe: "ImageClassificationPipeline") -> None:
    if not (hasattr(pipe, "task") and hasattr(pipe, "model")):
        raise TypeError(
            f"pipe must be a transformers pipeline, got {type(pipe).__name__}: build one with "
            f"pipeline('image-classification', model=..., image_processor=...)."
        )
    if pipe.task != "image-classification":
        raise UnsupportedModelError(f"The task of the pipeline must be 'image-classification', got {pipe.task!r}.")
    config = pipe.model.config
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
    factor = processor.rescale_factor if processor.do_rescale else 1.0
    mean: Any = processor.image_mean if processor.do_normalize else 0.0
    std: Any = processor.image_std if processor.do_normalize else 1.0
    mean, std = np.atleast_1d(np.asarray(mean, np.float64)), np.atleast_1d(np.asarray(std, np.float64))
    if not (np.isfinite(factor) and factor > 0 and np.all(np.isfinite(mean)) and np.all(np.isfinite(std) & (std > 0))):
        raise UnsupportedProcessorError(
            f"rescale_factor and image_std must be finite and > 0, got rescale_factor={factor!r}, "
            f"image_mean={processor.image_mean!r}, image_std={processor.image_std!r}: the pixels could not be "
            f"recovered."
        )
    scale, shift = np.broadcast_arrays(255 * factor / std, -mean / std)
    return tuple(torch.tensor(part[:, None, None], dtype=torch.float32) for part in (scale, shift))  # type: ignore[return-value]


def _load(image: ImageInput, position: int, *, gray: bool) -> Image.Image | NDArray[np.uint8]:
    """Return one input as the processor takes it: PIL images, files and flat arrays as RGB or gray."""
    if isinstance(image, str | os.PathLike):
        try:
            with Image.open(image) as opened:
                return _convert(opened, gray)
        except (OSError, ValueError) as error:
            raise InputImageError(
                f"Input {position} must be a readable image file, got {os.fspath(image)!r}: {error}"
            ) from error
    if isinstance(image, Image.Image):
        return _convert(image, gray)
    if isinstance(image, np.ndarray) and image.dtype == np.uint8:
        if image.ndim not in (2, 3) or image.size == 0:
            raise InputImageError(
                f"Input {position} must have shape [H, W], [H, W, C] or [C, H, W], got {list(image.shape)}."
            )
        return _convert(Image.fromarray(image), gray) if image.ndim == 2 else image
    kind = f"an array of {image.dtype}" if isinstance(image, np.ndarray) else type(image).__name__
    raise TypeError(
        f"Input {position} must be a path, a PIL image or a uint8 array, got {kind}: 8-bit values fix what raw pixels "
        f"in [0, 1] are; for a datasets.Dataset pass its image column."
    )


def _convert(image: Image.Image, gray: bool) -> Image.Image:
    """Return the image as RGB or gray, the orientation tag applied as in the pipeline."""
    return ImageOps.exif_transpose(image).convert("L" if gray else "RGB")
