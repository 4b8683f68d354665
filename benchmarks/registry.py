"""The list of benchmarks, the clock they share, their targets, and the facts that belong beside every figure."""

import importlib.metadata
import math
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

# seconds: what takes less is called several times in a row and reported as the mean, or the clock would be measured
SHORT = 5e-3


def benchmark(function: Benchmark) -> Benchmark:
    """Register a function that yields one row of figures for each case, under its own name."""
    BENCHMARKS[function.__name__] = function
    return function


def alternate(
    cases: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 15,
    least: int | None = None,
    seconds: float = math.inf,
    warm: bool = True,
) -> dict[str, list[float]]:
    """Return the times in seconds of each case, taken in turn so that a slow moment hits all of them.

    Args:
        cases: The work to time, by name.
        rounds: The largest number of rounds.
        least: The smallest number of rounds, whatever they take. ``None`` means ``rounds``.
        seconds: After so many seconds no further round begins.
        warm: Whether untimed calls come first. Without them every case is called once a round, short or not.
    """
    calls = {name: _calls(work) if warm else 1 for name, work in cases.items()}
    times: dict[str, list[float]] = {name: [] for name in cases}
    start = time.perf_counter()
    for number in range(rounds):
        if number >= (rounds if least is None else least) and time.perf_counter() - start > seconds:
            break
        for name, work in cases.items():
            times[name].append(_seconds(work, calls[name]))
    return times


def _calls(work: Callable[[], object]) -> int:
    """Return how many calls last as long as ``SHORT``, after one that only warms up."""
    if (first := _seconds(work)) > 10 * SHORT:
        return 1
    return max(1, round(SHORT / min(first, _seconds(work))))


def _seconds(work: Callable[[], object], calls: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        work()
    return (time.perf_counter() - start) / calls


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


def target(value: float, *, at_most: float | None = None, at_least: float | None = None) -> Row:
    """Return the target and whether ``value`` meets it, the last two figures of a row; dashes where there is none."""
    if at_most is not None:
        return {"target": f"<= {at_most:g}", "verdict": "met" if value <= at_most else "missed"}
    if at_least is not None:
        return {"target": f">= {at_least:g}", "verdict": "met" if value >= at_least else "missed"}
    return {"target": "-", "verdict": "-"}


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
