"""A run of certification in a process that can be killed at any moment, or kills itself before a record is synced."""

import os
import signal

import torch
from torch import nn

from hf_certify import EncodedInput, Space, certify_pipeline

INPUTS = 6
DRAWS = 20_000


class Vectors(Space):
    """Eight numbers, three classes, a small network; fast enough for a test, slow enough to be interrupted."""

    num_classes = 3
    units = "eight numbers"

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 3))
        self.model.eval()

    def encode(self, item: int, position: int) -> EncodedInput:
        return EncodedInput(torch.randn(8, generator=torch.Generator().manual_seed(item)), self.model)


def run(folder: str, begun: object = None, crash_at: int | None = None) -> None:
    """Certify with a journal in ``folder`` and save the report beside it.

    Args:
        folder: For journal and report.
        begun: An event to set before the first draw.
        crash_at: Which call of ``fsync`` is replaced by an end without warning.
    """
    torch.set_num_threads(1)
    fsync, calls = os.fsync, [0]

    def crashing(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] == crash_at:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)

    os.fsync = crashing
    if begun is not None:
        begun.set()
    try:
        report = certify_pipeline(
            Vectors(),
            range(INPUTS),
            sigma=0.5,
            n=DRAWS,
            batch_size=100,
            seed=7,
            progress=False,
            resume=os.path.join(folder, "journal"),
        )
        report.save(os.path.join(folder, "report"), overwrite=True)
    finally:
        os.fsync = fsync
