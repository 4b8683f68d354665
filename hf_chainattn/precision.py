"""Keeping an outer autocast out of what is computed in float32 or float64."""

import contextlib

import torch
from torch import Tensor


def without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Return a context for computing in the dtype that operands have, on the device of ``tensor``.

    Casting the operands alone would not do: an outer autocast would take products back to half precision.
    """
    kind = tensor.device.type
    # asking is faster than switching off, which short sequences feel
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()
