"""A run of certification in a process that can be killed at any moment, or kills itself before a record is synced."""

import os
import signal
from pathlib import Path

import torch
from torch import distributed, nn

from hf_certify import CertificationReport, EncodedInput, Space, attack, certify_pipeline
from hf_certify.storage import encode_report

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


def run_as(rank: int, count: int, store: str, folder: str, journal: bool = True) -> None:
    """Run as one of several processes that meet at the file ``store``."""
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
    run(folder, journal=journal)
    distributed.destroy_process_group()


def attack_as(rank: int, count: int, store: str, folder: str) -> None:
    """Attack the report in ``folder`` as one of several processes, and write what each has found."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
    report = CertificationReport.load(os.path.join(folder, "report"))
    found = attack(
        Vectors(), range(INPUTS), report, radii=[0.5, 2.0], steps=3, samples=4, n=500, seed=3, progress=False
    )
    Path(folder, f"attack-{count}-{rank}.json").write_bytes(encode_report(found.to_dict()))
    distributed.destroy_process_group()


def run(folder: str, begun: object = None, crash_at: int | None = None, journal: bool = True) -> None:
    """Certify with a journal in ``folder`` and save the report beside it.

    Args:
        folder: For journal and report.
        begun: An event to set before the first draw.
        crash_at: Which call of ``fsync`` is replaced by an end without warning.
        journal: Whether there is one.
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
            resume=os.path.join(folder, "journal") if journal else None,
        )
        report.save(os.path.join(folder, "report"), overwrite=True)
    finally:
        os.fsync = fsync
