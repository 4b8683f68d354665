"""What was certified, where and with which versions: the plain values that a report records besides its votes."""

import datetime
import hashlib
import importlib.metadata
import platform
from typing import Any

import torch
from torch import Tensor, nn

from hf_certify.noise import NOISE_SCHEMA

DISTRIBUTION = "hf-chain-highway-certify"

_DISTRIBUTIONS = (DISTRIBUTION, "torch", "transformers", "numpy", "scipy", "pillow")


def model_facts(model: nn.Module) -> dict[str, Any]:
    """Return what identifies the model: class, dtype, a SHA-256 of the weights, and what its config says, if any.

    Args:
        model: A transformers model, any module, or one around a transformers model that it holds as ``model``.
    """
    named = model if hasattr(model, "config") else getattr(model, "model", model)
    config = getattr(named, "config", None)
    dtypes = {str(p.dtype).removeprefix("torch.") for p in named.parameters()}
    facts: dict[str, Any] = {
        "model": type(named).__name__,
        "dtype": " and ".join(sorted(dtypes)) or "float32",
        "weights_sha256": _weights_hash(named),
    }
    if config is not None:
        facts["model_name"] = str(getattr(config, "_name_or_path", ""))
        facts["labels"] = {str(index): str(name) for index, name in config.id2label.items()}
    return facts


def run_info(seconds: float, draws: int, processes: int) -> dict[str, Any]:
    """Return what says how fast a run was, which is no part of its report."""
    return {
        "seconds": round(seconds, 3),
        "draws": draws,
        "processes": processes,
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "host": platform.node(),
    }


def _weights_hash(model: nn.Module) -> str:
    """Return the SHA-256 of all parameters and buffers with their names, in the order of the names.

    Of an entry that is no tensor, the extra state of a module, only the name and the type go in: it has no bytes that
    would be the same in every process.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, Tensor):
            digest.update(f"{name} {type(tensor).__name__}".encode())
            continue
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def machine_facts(device: torch.device) -> dict[str, Any]:
    """Return what votes on a decision boundary may depend on through floating-point rounding."""
    return {
        "device": device.type if device.type == "cpu" else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "noise_schema": NOISE_SCHEMA,
        "versions": {"python": platform.python_version(), **versions()},
    }


def versions() -> dict[str, str]:
    """Return the version of each installed distribution that has a part in the result."""
    found = {}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            # a checkout on the path has no metadata of its own
            found[name] = "not installed"
    return found
