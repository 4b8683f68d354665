"""Two processes that gloo connects, as accelerate and transformers expect to be started."""

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed


def _start(rank: int, folder: str, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(work(rank, folder, *arguments), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def in_two_processes(folder: Path, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return what ``work(rank, folder, ...)``, a function of a module, returned in both."""
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=_start, args=(rank, str(folder), work, arguments)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(250)
        rank.kill()
    assert [rank.exitcode for rank in ranks] == [0, 0]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]
