"""The section on certification of docs/benchmarks.md."""

from itertools import groupby

from benchmarks.registry import Row
from benchmarks.table import markdown, verdict

CAPTIONS = {
    "forward": """### Over the forward passes alone

The time to draw and count over that of as many rows through a ViT for 32 x 32 pixels and nothing else. What is above 1
is noise, votes and bookkeeping. The share is the time of the fastest batch size without them over that of the fastest
with them, round by round.""",
    "plain": """### Over a plain loop

The time of a loop as one writes it first (`repeat`, `randn_like`, `argmax`, `bincount` on the host) over that of this
one, which takes its batch size by itself, on two convolutions and a linear head. The target is for the batch size at
which the plain loop is fastest.""",
    "memory": """### Extra memory

How far the peak of the resident set rises while votes are counted: `VmHWM`, in a process of its own for each figure.
For comparison all noisy copies in one tensor, which 1.2 GB would be needed for at the most draws.""",
}


def certify_tables(rows: list[Row]) -> list[str]:
    """Return the blocks of the section: the verdict on all targets, and captions and tables of all parts."""
    blocks = [verdict(rows)]
    for part, group in groupby(rows, key=lambda row: row["part"]):
        members = [{name: value for name, value in row.items() if name != "part"} for row in group]
        # rows with other columns make a table of their own
        blocks += [CAPTIONS[part], *(markdown(list(same)) for _, same in groupby(members, key=list))]
    return blocks
