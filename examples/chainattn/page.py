"""``python -m examples.chainattn.page``: write the tables of the stored runs into docs/examples.md."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from examples.chainattn.tables import chaintrack_tables, program_tables
from examples.end_to_end.tables import Table

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"
PAGE = ROOT / "docs" / "examples.md"
TABLES: dict[str, Callable[[dict[str, Any]], list[Table]]] = {
    "chaintrack": chaintrack_tables,
    "generate": program_tables,
}


def with_results(page: str, results: Path = RESULTS) -> str:
    """Return the text of the page with what stands between each two marks replaced by the tables of the stored run."""
    for name, tables in TABLES.items():
        run = json.loads((results / f"{name}.json").read_text(encoding="utf8"))
        facts = ", ".join(f"{key} {value}" for key, value in run["facts"].items())
        blocks = [f"{table.title}:\n\n{table.markdown()}" for table in tables(run)]
        minutes = sum(row["seconds"] for row in run["rows"]) / 60
        text = "\n\n".join([*blocks, f"Training took {minutes:.0f} minutes of one core in all ({facts})."])
        begin, end = f"<!-- {name}: written by `python -m examples.chainattn.page` -->", f"<!-- {name} end -->"
        page, count = re.subn(
            f"{re.escape(begin)}.*?{re.escape(end)}",
            lambda _, new=f"{begin}\n{text}\n{end}": new,
            page,
            flags=re.DOTALL,
        )
        if count != 1:
            raise ValueError(f"The page must have the marks {begin!r} and {end!r} once, found {count} of them.")
    return page


if __name__ == "__main__":
    PAGE.write_text(with_results(PAGE.read_text(encoding="utf8")), encoding="utf8")
    print(f"{PAGE} shows the runs of {RESULTS}")
