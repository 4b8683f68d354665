"""What can be smoothed: one module for each kind of pipeline, and the class they share."""

from typing import TYPE_CHECKING

from hf_certify.errors import UnsupportedModelError
from hf_certify.spaces.base import EncodedInput, Space
from hf_certify.spaces.image import ImageSpace

if TYPE_CHECKING:
    from transformers import Pipeline

__all__ = ["EncodedInput", "Space", "space_of"]

_BY_TASK = {"image-classification": ImageSpace}


def space_of(pipe: "Pipeline | Space") -> Space:
    """Return the space of a pipeline, by its task; a space is returned as it is.

    Raises:
        TypeError: If ``pipe`` is neither.
        UnsupportedModelError: If no space is known for the task.
    """
    if isinstance(pipe, Space):
        return pipe
    if not (hasattr(pipe, "task") and hasattr(pipe, "model")):
        raise TypeError(
            f"pipe must be a transformers pipeline or a Space, got {type(pipe).__name__}: build one with "
            f"pipeline('image-classification', model=..., image_processor=...)."
        )
    if pipe.task not in _BY_TASK:
        raise UnsupportedModelError(
            f"The task of the pipeline must be one of {sorted(_BY_TASK)}, got {pipe.task!r}: write a Space for it."
        )
    return _BY_TASK[pipe.task](pipe)
