"""The section on chain attention of docs/benchmarks.md: a short table for each question, the full one for times."""

from collections.abc import Iterable
from itertools import groupby
from typing import Any

from benchmarks.registry import Row
from benchmarks.table import cell, markdown, verdict

CAPTIONS = {
    "time": """### Time over sdpa

The time of chain attention over that of torch's `scaled_dot_product_attention` with `is_causal=True`: median and
quartiles. For comparison, at batch 1: eager attention of transformers and the naive chain solve (softmax matrix,
`solve_triangular`, autograd), also over sdpa. They are left out where about twelve `[T, T]` matrices for each head
would take more than 6 GB.""",
    "short": """### Time over sdpa, short sequences

What is measured is said under the next heading. Starting small operations takes most of the time here.""",
    "removed": """### Diagonal removed over kept

The time with `diagonal="removed"` over that with `"kept"`, batch 1.""",
    "window": """### Whole over window

The time without a window over that with one, batch 1.""",
    "memory": """### Extra memory

How far one forward and backward pass lifts the peak of the resident set above what is held before it, outputs and
gradients included: `VmHWM`, in a process of its own for each figure, batch 1. The ratio is that of chain attention to
sdpa.""",
    "curve": """### Growth with the number of tokens

Forward and backward, batch 1: the time of chain attention and of sdpa in milliseconds, and the extra memory of chain
attention. The exponents are the slopes of straight lines through the logarithms.""",
    "threads": """### Two threads

The time on one thread over that on two.""",
    "compile": """### Compilation

Seconds that the first call of `torch.compile(model, fullgraph=True)` takes longer with chain attention than with sdpa:
a forward pass without gradients, nothing cached, median and range.""",
    "decode": """### Decoding with a cache

The time of a token of a Llama with four layers, 512 wide, 8 query heads, after a prompt, over that with sdpa, both
with a dynamic cache. `relative_error` is that of the logits to those without a cache. The cache of chain attention
holds `U` for every query head: with grouped heads it is larger.""",
}


def chain_tables(rows: list[Row]) -> list[str]:
    """Return the blocks of the section: the verdict on all targets, and captions and tables of all parts."""
    blocks = [verdict(rows)]
    for part, group in groupby(rows, key=lambda row: row["part"]):
        members = [{name: value for name, value in row.items() if name != "part"} for row in group]
        blocks.append(CAPTIONS[part])
        if part in ("short", "time"):
            blocks += time_tables(members)
        else:
            # rows with other columns make a table of their own
            blocks += [markdown(list(same)) for _, same in groupby(members, key=list)]
    return blocks


def time_tables(rows: list[Row]) -> list[str]:
    """Return for each pass a table of ratios by tokens and batch, and one with everything else that was measured."""
    blocks = []
    for case in unique(row["case"] for row in rows):
        lines = []
        for tokens in unique(row["tokens"] for row in rows):
            here = {row["batch"]: row for row in rows if (row["case"], row["tokens"]) == (case, tokens)}
            first = next(iter(here.values()))
            ratios = {f"batch {batch}": spread(row) for batch, row in here.items()}
            others = {name: first[f"{name}_ratio"] for name in ("eager", "naive")}
            lines.append({"tokens": tokens, "target": first["target"], **ratios, **others})
        blocks += [f"{case[0].upper()}{case[1:]}:", markdown(lines)]
    shown = ("target", "verdict", "ratio", "quartiles")
    rest = [{name: value for name, value in row.items() if name not in shown} for row in rows]
    return [*blocks, "The same runs: times in milliseconds, and rounds.", markdown(rest)]


def spread(row: Row) -> str:
    """Return ratio and quartiles as one cell, in bold where the target is missed."""
    text = f"{cell(row['ratio'])} ({cell(row['quartiles'])})"
    return f"**{text} missed**" if row["verdict"] == "missed" else text


def unique(values: Iterable[Any]) -> list[Any]:
    """Return the values without repetition, in the order of their first appearance."""
    return list(dict.fromkeys(values))
