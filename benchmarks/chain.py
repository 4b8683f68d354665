"""Chain attention: time against other ways to attend, memory, growth with T, threads and compilation.

Float32, 8 heads of 64, gamma 0.9. ``python -m benchmarks.chain memory curve`` prints some parts and writes nothing.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator

import torch

from benchmarks.chain_compile import compile_time
from benchmarks.chain_memory import curve, memory
from benchmarks.chain_times import one_thread_over_two, removed_over_kept, time_over_sdpa, whole_over_window
from benchmarks.registry import Row, benchmark, machine_facts
from benchmarks.table import printed

PARTS: dict[str, Callable[[], Iterator[Row]]] = {
    "time": time_over_sdpa,
    "removed": removed_over_kept,
    "window": whole_over_window,
    "memory": memory,
    "curve": curve,
    "threads": one_thread_over_two,
    "compile": compile_time,
}


@benchmark
def chain() -> Iterator[Row]:
    """Yield the rows of all parts."""
    yield from rows_of(PARTS)


def rows_of(parts: Iterable[str]) -> Iterator[Row]:
    """Yield the rows of some parts."""
    for part in parts:
        for row in PARTS[part]():
            yield {"part": part, **row}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chain", description=__doc__)
    parser.add_argument("parts", nargs="+", choices=list(PARTS))
    torch.set_num_threads(1)
    print(", ".join(f"{name} {value}" for name, value in machine_facts().items()))
    for _ in printed(rows_of(parser.parse_args().parts)):
        pass
