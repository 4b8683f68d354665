"""Whether a pipeline and inputs are those of a report, before anything is done with them in its name."""

from collections.abc import Sequence
from typing import Any

from hf_certify.errors import VerificationError
from hf_certify.provenance import model_facts
from hf_certify.report import CertificationReport
from hf_certify.smoothing import check_input
from hf_certify.spaces.base import Space

# where a model was loaded from says nothing about what it computes
_FREE = frozenset({"model_name"})


def require_same_model(report: CertificationReport, space: Space) -> None:
    """Raise unless the space has the model, the weights and the processing that the report is about.

    Raises:
        VerificationError: If not; the message names what differs.
    """
    for name, found in {**space.facts(), **model_facts(space.model)}.items():
        if name not in _FREE and report.facts.get(name) != found:
            raise VerificationError(
                f"Model and processing must be those that were certified, got another {name}: "
                f"{shorten(found)}, and {shorten(report.facts.get(name))} in the report."
            )


def require_same_inputs(report: CertificationReport, space: Space, items: Sequence[Any]) -> None:
    """Raise unless the inputs are those of the report, in their order. Every input is encoded once.

    Raises:
        VerificationError: If not; the message says which input differs.
    """
    digests = report.facts.get("inputs_sha256", [])
    if len(items) != len(digests):
        raise VerificationError(
            f"The inputs must be those that were certified, {len(digests)} of them, got {len(items)}: pass all of "
            f"them in their order."
        )
    for position, digest in enumerate(digests):
        encoded = space.encode(items[position], position)
        check_input(encoded.x, report.config.sigma)
        if encoded.digest() != digest:
            raise VerificationError(
                f"Input {position} must be the one that was certified, got other values than those of its digest "
                f"{digest[:12]}: pass the same inputs in their order."
            )


def shorten(value: object) -> str:
    """Return a value for a message, cut off where it is long.

    Example:
        >>> shorten("abc"), len(shorten("a" * 1000))
        ("'abc'", 60)
    """
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
