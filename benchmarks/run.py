"""``python -m benchmarks.run [chain] [highway] [certify]``: run benchmarks, print tables, write JSON."""

import argparse
import json
from pathlib import Path

import torch

from benchmarks import certify, chain, highway  # noqa: F401  they register themselves
from benchmarks.registry import BENCHMARKS, machine_facts
from benchmarks.table import missed, printed


def main() -> None:
    """Run the chosen benchmarks."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("names", nargs="*", default=list(BENCHMARKS), help=f"of {', '.join(BENCHMARKS)}; default: all")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="of torch, default: %(default)s")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.names) - set(BENCHMARKS)):
        parser.error(f"benchmarks must be among {list(BENCHMARKS)}, got {unknown}")
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    print(", ".join(f"{name} {value}" for name, value in machine_facts().items()))
    for name in arguments.names:
        print(f"\n== {name}")
        rows = list(printed(BENCHMARKS[name]()))
        for phrase in missed(rows):
            print(f"missed: {phrase}")
        path = arguments.out / f"{name}.json"
        path.write_text(json.dumps({"facts": machine_facts(), "rows": rows}, indent=2) + "\n", encoding="utf8")
        print(f"written to {path}")


if __name__ == "__main__":
    main()
