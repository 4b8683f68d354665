"""The report of a run: one HTML file that opens offline, and the same numbers as JSON."""

import html
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.end_to_end.tables import TABLES, Table, statements

TITLES = {
    "chain": "Chain attention: one layer, references of any depth",
    "highway": "Highway-BP: gradients along the residual path",
    "certification": "Certification: radii that hold",
}
COLORS = ("#1f6feb", "#d1603d", "#2f8f5b", "#8a63d2")
STYLE = """
:root { color-scheme: light; --ink: #1c2430; --soft: #5b6675; --line: #dfe4ea; --card: #ffffff; --page: #f5f7f9; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .4rem; }
h2 { font-size: 1.25rem; margin: 0 0 .6rem; }
h3 { font-size: .95rem; margin: 1.4rem 0 .4rem; }
.facts { color: var(--soft); font-size: .88rem; margin: 0 0 2rem; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
section { padding: 1.5rem; margin: 0 0 1.5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .4rem .6rem; border-bottom: 1px solid var(--line); }
th { font-weight: 600; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; white-space: nowrap; }
figure { margin: 1.4rem 0 0; }
figure svg { width: 100%; height: auto; }
.time { color: var(--soft); font-size: .85rem; margin: 1rem 0 0; }
"""


def chain_plot(axes: Axes, result: dict[str, Any]) -> None:
    """Accuracy against depth, both models, at both lengths."""
    for color, (name, model) in zip(COLORS, result["models"].items(), strict=False):
        for style, marker, (length, accuracy) in zip("-:", "os", model["accuracy"].items(), strict=True):
            depths = [key for key in accuracy if key not in ("overall", "unseen")]
            values = [accuracy[key] for key in depths]
            axes.plot(depths, values, style, marker=marker, color=color, label=f"{name}, {length}")
    axes.axhline(1 / 3, color="#9aa4b0", linewidth=1)
    axes.text(0, 1 / 3 - 0.06, "guessing", color="#5b6675", fontsize=8)
    axes.set(xlabel="hops to the answer", ylabel="share of right answers", ylim=(0, 1.05))
    axes.legend(frameon=False, fontsize=8)


def highway_plot(axes: Axes, result: dict[str, Any]) -> None:
    """Training loss against steps, exact and approximate gradients."""
    for color, (name, curve) in zip(COLORS, result["curves"].items(), strict=False):
        steps, losses = zip(*curve, strict=True)
        axes.plot(steps, losses, color=color, label=name)
    axes.set(xlabel="step", ylabel="training loss")
    axes.legend(frameon=False, fontsize=8)


def certification_plot(axes: Axes, result: dict[str, Any]) -> None:
    """Certified accuracy against radius, one stair for each interval."""
    for color, (name, figures) in zip(COLORS, result["intervals"].items(), strict=False):
        # a radius of 0 is an abstention or a wrong class
        radii = sorted((radius for radius in figures["radii"] if radius > 0), reverse=True)
        shares = [(index + 1) / len(figures["radii"]) for index in range(len(radii))]
        axes.step(
            [*radii, 0.0],
            [*shares, len(radii) / len(figures["radii"])],
            where="pre",
            color=color,
            label=name,
            linewidth=1.2,
        )
    axes.set(xlabel="l2 radius, RGB pixels in [0, 1]", ylabel="certified accuracy", ylim=(0, 1.05), xlim=(0, None))
    axes.legend(frameon=False, fontsize=8)


PLOTS: dict[str, Callable[[Axes, dict[str, Any]], None]] = {
    "chain": chain_plot,
    "highway": highway_plot,
    "certification": certification_plot,
}


def write_report(folder: Path, run: dict[str, Any]) -> Path:
    """Write ``report.json`` and ``report.html`` into ``folder`` and return the path of the HTML file.

    Args:
        folder: Created if needed; files of an earlier run are replaced, each in one step.
        run: ``facts`` of the machine, ``seconds`` in all, and ``parts`` with the result of each part.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "report.json", json.dumps(run, indent=2) + "\n")
    sections = "".join(_section(part, result) for part, result in run["parts"].items())
    facts = " · ".join(f"{html.escape(name)} {html.escape(str(value))}" for name, value in run["facts"].items())
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width"><title>hf-chain-highway-certify: a run end to end</title>'
        f"<style>{STYLE}</style></head><body><main><h1>A run end to end on real data</h1>"
        f'<p class="facts">{facts} · {run["seconds"]:.0f} s in all</p>{sections}</main></body></html>\n'
    )
    path = folder / "report.html"
    _write(path, page)
    return path


def _section(part: str, result: dict[str, Any]) -> str:
    text = "".join(f"<p>{html.escape(sentence)}</p>" for sentence in statements(part, result))
    tables = "".join(_html_table(table) for table in TABLES[part](result))
    figure = f"<figure>{_svg(PLOTS[part], result)}</figure>"
    time = f'<p class="time">This part took {result["total_seconds"]:.0f} s.</p>'
    return f"<section><h2>{html.escape(TITLES[part])}</h2>{text}{tables}{figure}{time}</section>"


def _html_table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.head)
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    return (
        f'<h3>{html.escape(table.title)}</h3><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _svg(plot: Callable[[Axes, dict[str, Any]], None], result: dict[str, Any]) -> str:
    # a fixed salt keeps the ids of two runs equal; text stays text
    with mpl.rc_context({"svg.hashsalt": "report", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure = Figure(figsize=(7.2, 3.2), layout="constrained")
        axes = figure.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6eaee", linewidth=0.8)
        plot(axes, result)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf8")
    os.replace(part, path)
