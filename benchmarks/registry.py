"""The list of benchmarks, the clock they share, and the facts that belong beside every figure."""

import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

Row = dict[str, Any]
Benchmark = Callable[[], Iterator[Row]]

BENCHMARKS: dict[str, Benchmark] = {}


def benchmark(function: Benchmark) -> Benchmark:
    """Register a function that yields one row of figures for each case, under its own name."""
    BENCHMARKS[function.__name__] = function
    return function


def alternate(cases: Mapping[str, Callable[[], object]], *, rounds: int = 15) -> dict[str, list[float]]:
    """Return ``rounds`` times in seconds for each case, taken in turn so that a slow moment hits all of them.

    One untimed round comes first.
    """
    times: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        for name, work in cases.items():
            start = time.perf_counter()
            work()
            if number:
                times[name].append(time.perf_counter() - start)
    return times


def ratio(times: Mapping[str, list[float]], case: str, baseline: str) -> Row:
    """Return median and quartiles of the time of ``case`` over that of ``baseline``, round by round."""
    ratios = [a / b for a, b in zip(times[case], times[baseline], strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4)
    return {
        "ratio": median,
        "quartiles": [low, high],
        "rounds": len(ratios),
        "milliseconds": 1e3 * statistics.median(times[case]),
    }


def machine_facts() -> dict[str, Any]:
    """Return what the figures depend on besides the code."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    return {
        "python": platform.python_version(),
        **versions,
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
