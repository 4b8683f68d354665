"""What a pipeline must offer to be smoothed: inputs as tensors that noise is added to, and a model of such tensors."""

import abc
import dataclasses
import hashlib
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_certify.certificate import Certificate
from hf_certify.config import CertifyConfig
from hf_certify.perturbation import GaussianNoise, Perturbation


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedInput:
    """One input, ready to be smoothed.

    Attributes:
        x: `[*shape]`, what noise is added to, in the units of the space, on the device of the model.
        model: Maps `[B, *shape]` to logits `[B, *outputs, K]`, each row by itself. It may be one for all inputs, or
            hold what belongs to this one, such as the tokens that get no noise.
        source: Where the input came from, such as a path, or its text; kept in the certificate.
        context: Tensors that ``model`` holds for this input; they are part of its digest.
    """

    x: Tensor
    model: nn.Module
    source: str | None = None
    context: tuple[Tensor, ...] = ()

    def digest(self) -> str:
        """Return the SHA-256 of what is certified: shapes, types and bytes of ``x`` and ``context``."""
        found = hashlib.sha256()
        for tensor in (self.x, *self.context):
            found.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
            found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return found.hexdigest()


class Space(abc.ABC):
    """A classifier taken apart: ``encode`` gives what noise is added to, and the model of it.

    Subclass it to certify what this package does not know, and pass the object to ``certify_pipeline`` in the place of
    a pipeline. The guarantee is about the ``x`` that ``encode`` returns, so whatever happens before it must not depend
    on the noise, and whatever happens after it belongs to the model.

    Attributes:
        model: The module that is hashed and checked for evaluation mode.
        num_classes: K, ``>= 2``.
        outputs: Nothing for one answer to an input, else the number of answers, each with K classes.
        units: What ``x`` and with it sigma and every radius are measured in, in words.
        norm: The norm of the radius.
        array_ndim: Dimensions of one input that is given as an array; a collection has more.

    Example:
        >>> import torch
        >>> from hf_certify import EncodedInput, Space, certify_pipeline
        >>> class Vectors(Space):
        ...     model = torch.nn.Linear(2, 3).eval()
        ...     num_classes = 3
        ...     units = "the two coordinates"
        ...     def encode(self, item, position):
        ...         return EncodedInput(torch.tensor(item), self.model)
        >>> report = certify_pipeline(Vectors(), [[0.5, 1.0]], sigma=0.25, n=200, seed=0, progress=False)
        >>> report.facts["space"]
        'the two coordinates'
    """

    model: nn.Module
    num_classes: int
    outputs: tuple[int, ...] = ()
    units: str
    norm: str = "l2"
    array_ndim: int = 1

    @abc.abstractmethod
    def encode(self, item: Any, position: int) -> EncodedInput:  # noqa: ANN401  whatever the pipeline takes
        """Return one input, ready to be smoothed.

        Args:
            item: One of the inputs, as the pipeline takes it.
            position: Place among the inputs, for messages.
        """

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        tensor = next(itertools.chain(self.model.parameters(), self.model.buffers()), None)
        return torch.device("cpu") if tensor is None else torch.device(tensor.device)

    def facts(self) -> dict[str, Any]:
        """Return what identifies the processing, as plain values."""
        return {"space": self.units, "norm": self.norm}

    def perturbation(self, encoded: EncodedInput, config: CertifyConfig) -> Perturbation:
        """Return how copies of an input are made."""
        return GaussianNoise(encoded.x, config.sigma)

    def certificate(
        self,
        encoded: EncodedInput,
        selection: Sequence[int],
        estimation: Sequence[int],
        config: CertifyConfig,
        *,
        index: int,
        output: int | None,
    ) -> Certificate:
        """Return what the votes `[K]` of the two samples prove about one answer to an input."""
        return Certificate.from_counts(
            selection,
            estimation,
            sigma=config.sigma,
            alpha=config.alpha,
            interval=config.interval,
            margin=config.margin,
            index=index,
            output=output,
            source=encoded.source,
        )
