"""``python -m benchmarks.families``: check every model type of transformers, store what came out, write the page.

With names of model types, their rows take the place of those in the stored run. Half an hour on one core for all.
"""

import argparse
import json
import multiprocessing
from collections.abc import Iterable
from pathlib import Path

from benchmarks.families.catalogue import model_types
from benchmarks.families.page import PAGE, STORED, page
from benchmarks.families.rows import begin, row
from benchmarks.registry import Row, machine_facts


def main() -> None:
    """Check the chosen model types."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.families", description=__doc__)
    parser.add_argument("types", nargs="*", help="default: all")
    parser.add_argument("--processes", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=STORED, help="default: docs/results/chain_families.json")
    parser.add_argument("--page", type=Path, default=PAGE, help="default: docs/chainattn_models.md")
    arguments = parser.parse_args()
    known = model_types()
    if unknown := sorted(set(arguments.types) - set(known)):
        parser.error(f"model types must be among those of transformers, got {unknown}")
    rows: dict[str, Row] = {}
    if arguments.types and arguments.out.exists():
        rows = {each["type"]: each for each in json.loads(arguments.out.read_text(encoding="utf8"))["rows"]}
    # tasks of one type each, and processes that end after some: what a model leaves in memory does not add up
    with multiprocessing.get_context("spawn").Pool(arguments.processes, begin, maxtasksperchild=100) as pool:
        for made in pool.imap(row, arguments.types or known):
            print(f"{made['type']}: {made['status']}  {made.get('reason', '')[:100]}", flush=True)
            rows[made["type"]] = made
            _write(rows.values(), arguments.out)
    arguments.page.write_text(page(arguments.out), encoding="utf8")
    print(f"written to {arguments.out} and {arguments.page}")
    if wrong := [each["type"] for each in rows.values() if each["status"] == "wrong"]:
        raise SystemExit(f"wrong: {', '.join(wrong)}")


def _write(rows: Iterable[Row], path: Path) -> None:
    """Store rows, one a line, so that a difference between two runs can be read."""
    lines = ",\n".join(f"  {json.dumps(row)}" for row in sorted(rows, key=lambda row: row["type"]))
    path.write_text(f'{{"facts": {json.dumps(machine_facts())}, "rows": [\n{lines}\n]}}\n', encoding="utf8")


if __name__ == "__main__":
    main()
