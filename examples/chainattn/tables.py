"""The figures of the examples as tables, for the terminal and for docs/examples.md."""

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from examples.end_to_end.tables import Table, down
from hf_chainattn.tasks.chain_track import DEPTHS

DEPTH_NAMES = [str(low) if low == high else f"{low}-{high}" for low, high in DEPTHS]


def chaintrack_tables(run: dict[str, Any]) -> list[Table]:
    """Return accuracy by depth of every model, one table for each length: medians of the seeds, cut off."""
    return [
        _by_depth(f"ChainTrack, {length}", run["rows"], lambda row, length=length: row["accuracy"][length])
        for length in run["rows"][0]["accuracy"]
    ]


def _by_depth(title: str, rows: Sequence[dict[str, Any]], accuracy_of: Any) -> Table:  # noqa: ANN401
    """Return a table with a line for each kind of model, and a column for each depth that occurs."""
    found: dict[tuple[Any, ...], list[dict[str, float]]] = {}
    for row in sorted(rows, key=lambda row: (row["attention"] != "chain", row["layers"])):
        found.setdefault((row["attention"], row["layers"], row["steps"]), []).append(accuracy_of(row))
    depths = [name for name in DEPTH_NAMES if any(name in one for ones in found.values() for one in ones)]
    lines = [
        [*map(str, kind), _spread(one["overall"] for one in ones), *(_median(ones, name) for name in depths)]
        for kind, ones in found.items()
    ]
    return Table(title, ["attention", "layers", "steps", "overall", *(f"depth {name}" for name in depths)], lines)


def _median(ones: Iterable[dict[str, float]], name: str) -> str:
    values = [one[name] for one in ones if name in one]
    return down(statistics.median(values)) if values else "-"


def _spread(values: Iterable[float]) -> str:
    ordered = sorted(values)
    middle = down(statistics.median(ordered))
    return middle if len(ordered) == 1 else f"{middle} ({down(ordered[0])} to {down(ordered[-1])})"


def program_tables(run: dict[str, Any]) -> list[Table]:
    """Return the share of right answers of every model by depth."""
    return [_by_depth("Answers of generate(), by copies back to the digit", run["rows"], lambda row: row["accuracy"])]
