"""The peak of memory that a forward and backward pass adds, each in a process of its own, and how cost grows with T.

``python -m benchmarks.chain_memory chain 4096`` is such a process. It reads ``VmHWM``, its own largest resident set,
from ``/proc`` (Linux). ``ru_maxrss`` would not do: a child begins with that of the process that started it.
"""

import functools
import gc
import json
import re
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.chain_cases import ATTENTIONS, both, inputs
from benchmarks.chain_gate import gate
from benchmarks.chain_times import compare
from benchmarks.fresh import fresh
from benchmarks.registry import Row, ratio, target

REPEATS = 3
CURVE = (1024, 2048, 4096, 8192, 16384)


def peak() -> float:
    """Return the largest resident set of this process since it was last reset, in MiB."""
    status = Path("/proc/self/status").read_text(encoding="utf8")
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    if found is None:
        raise RuntimeError("the peak of memory needs VmHWM in /proc/self/status: run this part on Linux")
    return int(found[1]) / 1024


def added(name: str, tokens: int) -> float:
    """Return how far one forward and backward pass lifts the peak above what is held before it, in MiB.

    Outputs and gradients count, inputs and the cotangent do not.
    """
    torch.set_num_threads(1)
    both(ATTENTIONS[name], *inputs(1, 64))
    parts, cotangent = inputs(1, tokens)
    gc.collect()
    # sets the peak to what is resident now
    Path("/proc/self/clear_refs").write_text("5", encoding="utf8")
    before = peak()
    held = both(ATTENTIONS[name], parts, cotangent)
    after = peak()
    del held
    return after - before


@functools.cache
def extra_memory(name: str, tokens: int) -> float:
    """Return the median of ``added`` over fresh processes, three of them up to 1024 tokens, in MiB."""
    repeats = REPEATS if tokens <= 1024 else 1
    return statistics.median(float(fresh("benchmarks.chain_memory", name, tokens)) for _ in range(repeats))


def memory() -> Iterator[Row]:
    """Yield the extra memory in MiB of each way to attend, and that of chain attention over that of sdpa."""
    for tokens in (512, 1024, 2048, 4096):
        error = gate(1, tokens)
        extra = {name: extra_memory(name, tokens) for name in ATTENTIONS}
        over = extra["chain"] / extra["sdpa"]
        mebibytes = {f"{name}_MiB": value for name, value in extra.items()}
        yield {"tokens": tokens, "relative_error": error, **mebibytes, "ratio": over, **target(over, at_most=2)}


def curve() -> Iterator[Row]:
    """Yield time and extra memory of forward and backward by number of tokens, then the exponents fitted to them."""
    time, space = [], []
    for tokens in CURVE:
        error = gate(1, tokens)
        ways = {name: ATTENTIONS[name] for name in ("chain", "sdpa")}
        times = compare("forward + backward", ways, inputs(1, tokens), long=tokens >= 16384)
        figures = ratio(times, "chain", "sdpa")
        time.append(figures["milliseconds"])
        space.append(extra_memory("chain", tokens))
        baseline = 1e3 * statistics.median(times["sdpa"])
        row = {"tokens": tokens, "relative_error": error, **figures}
        yield {**row, "sdpa_milliseconds": baseline, "extra_MiB": space[-1]}
    for case, values, limit in (("time", time, 2.1), ("extra memory", space, 1.05)):
        logarithms = torch.tensor([CURVE, values], dtype=torch.float64).log().tolist()
        slope = statistics.linear_regression(*logarithms).slope
        yield {"case": f"exponent of {case}", "exponent": slope, **target(slope, at_most=limit)}


if __name__ == "__main__":
    print(json.dumps(added(sys.argv[1], int(sys.argv[2]))))
