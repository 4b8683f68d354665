"""Chain attention: time against other ways to attend, memory, growth with T, threads, compilation and decoding.

Float32, 8 heads of 64, gamma 0.9. ``python -m benchmarks.chain memory curve`` prints some parts and writes nothing;
with ``--into chain.json`` they take the place of the same parts of that run.
"""

import argparse
import functools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from benchmarks.chain_compile import compile_time
from benchmarks.chain_decode import decode_over_sdpa
from benchmarks.chain_memory import curve, memory
from benchmarks.chain_times import (
    LONGER,
    SHORT,
    one_thread_over_two,
    removed_over_kept,
    time_over_sdpa,
    whole_over_window,
)
from benchmarks.registry import Row, benchmark, machine_facts
from benchmarks.table import printed

PARTS: dict[str, Callable[[], Iterator[Row]]] = {
    "short": functools.partial(time_over_sdpa, SHORT),
    "time": functools.partial(time_over_sdpa, LONGER),
    "removed": removed_over_kept,
    "window": whole_over_window,
    "memory": memory,
    "curve": curve,
    "threads": one_thread_over_two,
    "compile": compile_time,
    "decode": decode_over_sdpa,
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


def main() -> None:
    """Run some parts."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chain", description=__doc__)
    parser.add_argument("parts", nargs="+", choices=list(PARTS))
    parser.add_argument("--into", type=Path, help="a stored run on the same machine and versions")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(", ".join(f"{name} {value}" for name, value in machine_facts().items()))
    rows = list(printed(rows_of(arguments.parts)))
    if arguments.into is None:
        return
    run = json.loads(arguments.into.read_text(encoding="utf8"))
    if run["facts"] != machine_facts():
        parser.error(f"{arguments.into} was measured with {run['facts']}")
    rows += [row for row in run["rows"] if row["part"] not in arguments.parts]
    rows.sort(key=lambda row: list(PARTS).index(row["part"]))
    arguments.into.write_text(json.dumps({**run, "rows": rows}, indent=2) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
