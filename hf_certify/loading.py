"""Pipelines from a folder or the hub: processors that can be undone, and no weight missing."""

from typing import TYPE_CHECKING

from hf_certify.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import ImageClassificationPipeline

_NO_CLASSIFIER = "MODEL must be an image classifier saved with its processor (Trainer(processing_class=processor))"


def load_pipeline(model: str, *, quiet: bool = False) -> "ImageClassificationPipeline":
    """Return the image-classification pipeline of a folder or hub id, its processor on the ``pil`` backend.

    Args:
        model: Folder or hub id.
        quiet: Whether to hide the progress bars of transformers.

    Raises:
        UnsupportedModelError: If there is no image classifier with its image processor, or weights are missing.
    """
    # here, so that --help and the report command do not wait for it
    from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    if quiet:
        logging.disable_progress_bar()
    try:
        processor = AutoImageProcessor.from_pretrained(model, backend="pil")
        classifier, loading = AutoModelForImageClassification.from_pretrained(model, output_loading_info=True)
        pipe = pipeline("image-classification", model=classifier, image_processor=processor)
    # a damaged file may raise anything
    except Exception as error:
        raise UnsupportedModelError(f"{_NO_CLASSIFIER}, got {model!r}: {error}") from error
    finally:
        if bars:
            logging.enable_progress_bar()
    # transformers would go on with random weights in their place
    if missing := sorted(loading["missing_keys"]):
        raise UnsupportedModelError(f"{_NO_CLASSIFIER}, got {model!r} without the weights {missing!r}.")
    return pipe
