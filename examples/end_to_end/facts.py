"""What figures may depend on besides the code."""

import importlib.metadata
import os
import platform
from typing import Any

import torch


def machine_facts() -> dict[str, Any]:
    """Return versions, processor and threads."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "accelerate")}
    return {
        "Python": platform.python_version(),
        **versions,
        "CPU": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
