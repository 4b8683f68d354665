"""``python -m examples.end_to_end.readme``: write the tables of the stored run into README.md."""

import json
from pathlib import Path

from examples.end_to_end.report import TITLES
from examples.end_to_end.tables import TABLES

ROOT = Path(__file__).parents[2]
STORED = ROOT / "docs" / "results" / "report.json"
README = ROOT / "README.md"
BEGIN = "<!-- results: written by `python -m examples.end_to_end.readme` from docs/results/report.json -->"
END = "<!-- results end -->"


def with_results(readme: str, run: dict) -> str:
    """Return the text of the README with the block between the two marks replaced by the tables of ``run``."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    facts = ", ".join(f"{name} {value}" for name, value in run["facts"].items())
    blocks = [f"`make demo`, {run['seconds']:.0f} s in all ({facts}):"]
    for part, result in run["parts"].items():
        blocks.append(f"**{TITLES[part]}** ({result['total_seconds']:.0f} s)")
        blocks += [f"{table.title}:\n\n{table.markdown()}" for table in TABLES[part](result)]
    return before + BEGIN + "\n" + "\n\n".join(blocks) + "\n" + END + after


def main() -> None:
    """Rewrite README.md in place."""
    run = json.loads(STORED.read_text(encoding="utf8"))
    README.write_text(with_results(README.read_text(encoding="utf8"), run), encoding="utf8")
    print(f"{README} shows the run of {STORED}")


if __name__ == "__main__":
    main()
