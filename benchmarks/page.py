"""``python -m benchmarks.page``: write docs/benchmarks.md from the stored runs in docs/results."""

import json
from pathlib import Path
from typing import Any

from benchmarks.run import cell

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
TITLES = {
    "chain": "Chain attention over torch's scaled_dot_product_attention, causal, float32, 8 heads, d = 64, batch 1",
    "highway": "Highway-BP on one device: an untrained GPT-2 of 8 blocks, 8 x 64 tokens, over a plain step",
    "certify": "Drawing and counting votes over the bare forward passes of a two-layer convnet on 28 x 28 pixels",
}
NOTES = {
    "chain": "This first form holds the whole attention matrix in memory and solves it at once.",
    "highway": "Above 1 is slower. The cosine is that of the block gradients with exact ones. It falls with the width "
    "of an untrained model, whose stream is small beside what the blocks add to it.",
    "certify": "What is above 1 is noise, counting and bookkeeping.",
}


def page() -> str:
    """Return the text of the page."""
    blocks = [
        "# Benchmarks",
        "`make bench` measures, and writes JSON into `runs/benchmarks`. Every case is checked for correctness in the "
        "same run before it is timed. Times are ratios of alternating runs in one process: the median, and the "
        "quartiles over the rounds. The tables are generated from the runs stored in `docs/results`.",
    ]
    for name, title in TITLES.items():
        run = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf8"))
        facts = ", ".join(f"{key} {value}" for key, value in run["facts"].items())
        blocks += [f"## {name}", f"{title}. {NOTES[name]}", table(run["rows"]), f"Measured with {facts}."]
    return "\n\n".join(blocks) + "\n"


def table(rows: list[dict[str, Any]]) -> str:
    """Return rows of figures as a Markdown table."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([cell(value) for value in row.values()] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf8")
    print(f"written to {PAGE}")
