"""``python -m benchmarks.page``: write docs/benchmarks.md from the stored runs in docs/results."""

import argparse
import json
from pathlib import Path

from benchmarks.certify_page import certify_tables
from benchmarks.chain_page import chain_tables
from benchmarks.table import markdown

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
TITLES = {
    "chain": "Chain attention, causal, float32, 8 heads, d = 64, gamma = 0.9, on one core of a CPU",
    "highway": "Highway-BP on one device: an untrained GPT-2 of 8 blocks, 8 x 64 tokens, over a plain step",
    "certify": "Drawing and counting votes of a smoothed classifier, float32, 3 x 32 x 32 pixels",
}
TABLES = {"chain": chain_tables, "certify": certify_tables}
NOTES = {
    "chain": "Output and gradients of every case are compared with the definition in float64 before the clock starts; "
    "`relative_error` is the largest of the four. Above 1024 tokens one head is compared.",
    "highway": "Above 1 is slower. The cosine is that of the block gradients with exact ones. It falls with the width "
    "of an untrained model, whose stream is small beside what the blocks add to it.",
    "certify": "Votes are compared with those that the model casts on the same noise made all at once, before the "
    "clock starts.",
}


def page(results: Path = RESULTS) -> str:
    """Return the text of the page on the runs in a folder."""
    blocks = [
        "# Benchmarks",
        "`make bench` measures, and writes JSON into `runs/benchmarks`. Every case is checked for correctness in the "
        "same run before it is timed. Times are ratios of alternating runs in one process: the median, and the "
        "quartiles over the rounds. The tables are generated from the runs stored in `docs/results`.",
    ]
    for name, title in TITLES.items():
        run = json.loads((results / f"{name}.json").read_text(encoding="utf8"))
        facts = ", ".join(f"{key} {value}" for key, value in run["facts"].items())
        tables = TABLES[name](run["rows"]) if name in TABLES else [markdown(run["rows"])]
        blocks += [f"## {name}", f"{title}. {NOTES[name]}", *tables, f"Measured with {facts}."]
    return "\n\n".join(blocks) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.page", description=__doc__)
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder of the JSON files, default: docs/results"
    )
    parser.add_argument("--out", type=Path, default=PAGE, help="default: docs/benchmarks.md")
    arguments = parser.parse_args()
    arguments.out.write_text(page(arguments.results), encoding="utf8")
    print(f"written to {arguments.out}")
