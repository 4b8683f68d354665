"""What the trainings of the examples have in common: what a run is, its options, and several at a time."""

import argparse
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, Trainer
from transformers.utils import logging


@dataclass(frozen=True)
class Run:
    """One training.

    Args:
        attention: ``"chain"``, or any other that transformers knows.
        layers: Of the model.
        steps: Of the optimizer.
        seed: Of weights and data.
    """

    attention: str
    layers: int
    steps: int
    seed: int

    def folder(self, parent: Path) -> Path:
        """Return where the model of the run is kept."""
        return parent / f"{self.attention}-{self.layers}-{self.steps}-{self.seed}"

    def __str__(self) -> str:
        return f"{self.attention}, layers {self.layers}, steps {self.steps}, seed {self.seed}"


def options(
    *, module: str, text: str | None, models: Sequence[str], steps: int, deep_steps: int
) -> argparse.ArgumentParser:
    """Return the options of a command that trains models.

    Args:
        module: Of the command, in this package.
        text: What it does.
        models: Kinds of attention and numbers of layers, such as ``"chain-1"``.
        steps: Of one-layer models, unless told otherwise.
        deep_steps: Of deeper ones, likewise.
    """
    parser = argparse.ArgumentParser(prog=f"python -m examples.chainattn.{module}", description=text)
    shown = "default: %(default)s"
    parser.add_argument("--models", nargs="+", choices=models, default=models, metavar="MODEL", help=shown)
    parser.add_argument("--steps", type=int, default=steps, help=f"of one-layer models, {shown}")
    parser.add_argument("--deep-steps", type=int, default=deep_steps, help=f"of deeper models, {shown}")
    parser.add_argument("--seeds", type=int, default=3, help=shown)
    parser.add_argument("--jobs", type=int, default=2, help=f"trainings at a time, {shown}")
    parser.add_argument("--out", type=Path, default=Path("runs") / module, help=f"folder, {shown}")
    return parser


def planned(arguments: argparse.Namespace) -> list[Run]:
    """Return the runs that the options ask for, the longest first, so that no core waits for them at the end."""
    runs = []
    for attention, layers in (model.split("-") for model in arguments.models):
        steps = arguments.steps if layers == "1" else arguments.deep_steps
        runs += [Run(attention, int(layers), steps, seed) for seed in range(arguments.seeds)]
    return sorted(runs, key=lambda run: -run.layers * run.steps)


def quietly_trained(trainer: Trainer) -> list[float]:
    """Train, and return the losses that were logged instead of printing them."""
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def results(
    function: Callable[[Run, Path], dict[str, Any]], runs: Sequence[Run], folder: Path, *, jobs: int
) -> Iterator[dict[str, Any]]:
    """Yield ``function(run, folder)`` for each run in order; so many are computed at a time, on one thread each."""
    if jobs == 1:
        yield from (_on_one_thread(function, run, folder) for run in runs)
        return
    # new processes: a fork of one that has computed with several threads may hang
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        for waiting in [pool.submit(_on_one_thread, function, run, folder) for run in runs]:
            yield waiting.result()


def _on_one_thread(function: Callable[[Run, Path], dict[str, Any]], run: Run, folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    # many models are built, saved and loaded here, and messages of each would hide the figures
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return function(run, folder)
