"""Rows of figures as text: lines for a terminal, printed as soon as they are known, and Markdown tables."""

from collections.abc import Iterable, Iterator, Sequence

from benchmarks.registry import Row


def cell(value: object) -> str:
    """Return a figure as it stands in a table."""
    if isinstance(value, list):
        return " to ".join(map(cell, value))
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def markdown(rows: Sequence[Row]) -> str:
    """Return rows with the same columns as a Markdown table, a missed target in bold."""
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    for row in rows:
        cells = map(cell, row.values())
        lines.append(["**missed**" if text == "missed" else text for text in cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def printed(rows: Iterable[Row]) -> Iterator[Row]:
    """Pass rows on, and print each at once; a new head comes with every new ``part`` or set of columns."""
    columns: list[str] = []
    widths: list[int] = []
    part = None
    for row in rows:
        cells = {name: cell(value) for name, value in row.items() if name != "part"}
        if list(cells) != columns or row.get("part") != part:
            head = f"\n-- {row['part']}" if row.get("part") != part else ""
            columns, part = list(cells), row.get("part")
            # later rows are not known yet: text gets more room than numbers
            widths = [max(len(name), 8 if isinstance(row[name], int | float) else 18) for name in columns]
            print(head)
            print("  ".join(name.ljust(width) for name, width in zip(columns, widths, strict=True)).rstrip())
        line = "  ".join(text.ljust(width) for text, width in zip(cells.values(), widths, strict=True))
        print(line.rstrip(), flush=True)
        yield row


def missed(rows: Iterable[Row]) -> list[str]:
    """Return one phrase for each row that misses its target, made of what tells the row from others."""
    phrases = []
    for row in rows:
        if row.get("verdict") == "missed":
            names = ("part", "case", "batch", "tokens", "model")
            where = ", ".join(
                f"{name} {row[name]}" if name in ("batch", "tokens") else str(row[name])
                for name in names
                if name in row
            )
            phrases.append(f"{where} ({row['target']})")
    return phrases


def verdict(rows: Iterable[Row]) -> str:
    """Return one sentence or two: how many targets are met, and which are missed."""
    judged = [row for row in rows if row.get("verdict", "-") != "-"]
    phrases = missed(judged)
    text = f"{len(judged) - len(phrases)} of {len(judged)} targets are met."
    return f"{text} Missed: {'; '.join(phrases)}." if phrases else text
