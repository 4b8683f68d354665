"""``python -m examples.end_to_end``: run the three parts and write the report."""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.utils import logging

from examples.end_to_end import certification, chain, highway
from examples.end_to_end.facts import machine_facts
from examples.end_to_end.report import TITLES, write_report
from examples.end_to_end.tables import TABLES, statements

PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "chain": chain.run,
    "highway": highway.run,
    "certification": certification.run,
}


def show(part: str, result: dict[str, Any]) -> None:
    """Print the tables and sentences of a part."""
    print()
    for sentence in statements(part, result):
        print(sentence)
    for table in TABLES[part](result):
        print(f"\n{table.title}\n{table.markdown()}")
    print(f"\nThis part took {result['total_seconds']:.0f} s.", flush=True)


def main() -> None:
    """Run the chosen parts, print what they found, and write the report."""
    parser = argparse.ArgumentParser(prog="python -m examples.end_to_end", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="folder of the report (default: %(default)s)"
    )
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="default: all three")
    arguments = parser.parse_args()
    # models are built from scratch here, and two messages for each would hide the figures
    logging.set_verbosity_error()
    begin = time.perf_counter()
    parts = {}
    for number, part in enumerate(arguments.parts, 1):
        print(f"\n== Part {number} of {len(arguments.parts)}. {TITLES[part]}", flush=True)
        start = time.perf_counter()
        parts[part] = PARTS[part]()
        parts[part]["total_seconds"] = time.perf_counter() - start
        show(part, parts[part])
    run = {"facts": machine_facts(), "seconds": time.perf_counter() - begin, "parts": parts}
    path = write_report(arguments.out, run)
    print(f"\n{run['seconds']:.0f} s in all. Report: {path.resolve()}")


if __name__ == "__main__":
    main()
