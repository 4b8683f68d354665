"""One row of figures for each model type: what came out for its classes, taken together."""

import warnings

import torch
import transformers

from benchmarks.families.catalogue import classes_of
from benchmarks.families.check import Finding, check
from benchmarks.registry import Row

# what a type is, by its classes: the first of these that one of them is
ORDER = ("wrong", "checked", "in part", "refused", "not checked")


def begin() -> None:
    """Make a process ready: the models are so small that a second thread costs more than it brings."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")


def row(model_type: str) -> Row:
    """Return what came out for a model type."""
    try:
        classes = classes_of(model_type)
    except ImportError as error:
        return {"type": model_type, "status": "not checked", "reason": str(error)}
    if not classes:
        return {"type": model_type, "status": "not checked", "reason": "it has no model class of its own"}
    return together(model_type, [check(model_type, each) for each in classes])


def together(model_type: str, findings: list[Finding]) -> Row:
    """Return the findings for the classes of a type as one row: of errors the largest, of differences the smallest."""
    status = min((finding.status for finding in findings), key=ORDER.index)
    same = [finding for finding in findings if finding.status == status]
    made: Row = {"type": model_type, "status": status, "classes": [finding.name for finding in same]}
    if reason := same[0].reason:
        made["reason"] = reason
    if status not in ("checked", "in part"):
        return made
    differences = [finding.difference for finding in same if finding.difference is not None]
    return made | {
        "kind": same[0].kind,
        "asked": list(dict.fromkeys(key for finding in same for key in finding.asked)),
        "layers": max(finding.layers for finding in same),
        "dispatched": max(finding.dispatched for finding in same),
        "gamma_0": _rounded(max(finding.gamma_0 for finding in same)),
        "sdpa": _rounded(max((finding.sdpa for finding in same if finding.sdpa is not None), default=None)),
        "gamma_0.9": _rounded(max(finding.gamma_9 for finding in same)),
        "difference": _rounded(min(differences, default=None)),
        "dtype": same[0].dtype,
        "padding": list(dict.fromkeys(side for finding in same for side in finding.padding)),
        "images": any(finding.images for finding in same),
        "cache": next((finding.cache for finding in same if finding.cache), ""),
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.1e}")
