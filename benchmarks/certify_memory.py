"""The peak of memory that counting votes adds, each in a process of its own, by the number of draws.

``python -m benchmarks.certify_memory loop 100000`` is such a process.
"""

import gc
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from benchmarks.chain_memory import peak
from benchmarks.fresh import fresh
from benchmarks.registry import Row, target
from hf_certify import SmoothedClassifier

DRAWS = (1_000, 10_000, 100_000)
# all copies at once would be 1.2 GB for the largest number
FITS = 10_000


def added(way: str, draws: int) -> float:
    """Return how far the votes of so many draws lift the peak above what is held before, in MiB.

    Args:
        way: ``loop``, or ``at once``: all noisy copies in one tensor.
        draws: How many.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)).eval()
    image = torch.rand(3, 32, 32)
    smoothed = SmoothedClassifier(model, sigma=0.5, num_classes=10, batch_size=256, seed=0)
    # what the first forward pass leaves behind belongs to the model
    smoothed.predict(image, n=64)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf8")
    before = peak()
    if way == "loop":
        smoothed.predict(image, n=draws)
    else:
        with torch.inference_mode():
            model(image + 0.5 * torch.randn(draws, *image.shape)).argmax(1).bincount(minlength=10)
    return peak() - before


def memory() -> Iterator[Row]:
    """Yield the extra memory in MiB by number of draws, then how far it grows from the fewest to the most."""
    found = []
    for draws in DRAWS:
        found.append(float(fresh("benchmarks.certify_memory", "loop", draws)))
        whole = fresh("benchmarks.certify_memory", "at once", draws) if draws <= FITS else "does not fit"
        yield {"draws": draws, "extra_MiB": found[-1], "at_once_MiB": whole}
    growth = max(found) - min(found)
    yield {"case": "growth of extra memory in MiB", "growth": growth, **target(growth, at_most=1)}


if __name__ == "__main__":
    print(json.dumps(added(sys.argv[1], int(sys.argv[2]))))
