"""One self-contained page of results: no script, no network, light and dark, and readable in print."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from html import escape
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from pipeline.experiment import Experiment, Found
from pipeline.seeds import over_seeds
from stages import plots
from stages.looks import BLACK
from stages.tables import Table, of_methods, of_runs

INK = "#010203"  # stands for the colour of the page's text, which a viewer's light or dark setting decides
LOOK: dict[Any, Any] = {
    "svg.fonttype": "none", "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "savefig.transparent": True, "svg.hashsalt": "calora",
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color"), INK),
    "legend.facecolor": "none", "legend.edgecolor": INK, "legend.framealpha": 0,
}  # fmt: skip
DETAILED = 24  # runs, tasks and recipes counted apart: with the figures of each, the page has 2.4 MB then
STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #ffffff; --line: #c8c8c8; --soft: #f3f3f3 }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --paper: #16181b; --line: #45484d; --soft: #22252a } }
@media print { :root { --ink: #000000; --paper: #ffffff; --line: #999999; --soft: #ffffff } section { break-inside: avoid } }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; color: var(--ink); background: var(--paper); font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.5rem } h2 { font-size: 1.2rem; margin-top: 2.5rem } h3 { font-size: 1rem }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem }
th, td { padding: 0.3rem 0.5rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
th { background: var(--soft); white-space: normal; vertical-align: bottom } .text { text-align: left }
.pair { display: flex; flex-wrap: wrap; gap: 1rem } .pair figure { flex: 1 1 28rem } figure { margin: 1rem 0 } svg { max-width: 100%; height: auto; color: var(--ink) } figcaption { font-size: 0.85rem }
"""


def page(experiments: Mapping[str, Experiment]) -> str:
    """The HTML of one experiment or of several, by name."""
    parts = ["<h1>CA-LoRA: results</h1>"]
    if any(one.params for one in experiments.values()):
        parts.append(table_html(of_params(experiments)))
    if means := over_seeds(experiments):
        parts.append(table_html(means))
    runs = sum(len(recipes) for one in experiments.values() for recipes in one.found.values())
    for task in dict.fromkeys(task for one in experiments.values() for task in one.found):
        chosen = {name: one.found[task] for name, one in experiments.items() if task in one.found}
        rows = rows_of(chosen)
        parts += of_task(task, rows, alone=len(chosen) == 1)
        if runs <= DETAILED:
            parts += of_each(task, rows)
    if runs > DETAILED:
        parts.append(
            f"<p>No figures of single runs: there are {runs}, more than {DETAILED}. Compare fewer to see them.</p>"
        )
    size = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    head = f'<meta charset="utf-8">{size}<title>CA-LoRA: results</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"


def rows_of(experiments: Mapping[str, Mapping[str, Found]]) -> dict[str, Found]:
    """What experiments found on one task, under the name of the recipe, and of the experiment where there are several."""
    return {
        recipe if len(experiments) == 1 else f"{name}: {recipe}": found
        for name, recipes in experiments.items()
        for recipe, found in recipes.items()
    }


def of_task(task: str, rows: Mapping[str, Found], alone: bool) -> Iterator[str]:
    """All rows of one task together: the recipes of one experiment, or several experiments, the best first."""
    metrics = {row: found.metrics for row, found in rows.items()}
    yield f"<h2>{escape(task)}</h2>"
    yield table_html(of_runs("Before and after CA-LoRA", "recipe" if alone else "experiment: recipe", metrics))
    if alone:
        told = "Each recipe: inherited LoRA to CA-LoRA."
        first = figure_html(partial(plots.recipes_against_bytes, metrics, task), told)
    else:
        scores = {row: compared(metrics[row]) for row in sorted(rows, key=lambda row: -best(metrics[row]))}
        first = figure_html(partial(plots.ranking, scores, task), "Each run, the best first, with 95 % intervals.")
    told = "Every method; the line is the best accuracy for the bytes."
    yield pair(first, figure_html(partial(plots.front, metrics, task), told))


def compared(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The baseline and our method, those of the two that there are."""
    return {key: metrics["methods"][key] for key in (metrics["baseline"], metrics["ours"]) if key in metrics["methods"]}


def best(metrics: Mapping[str, Any]) -> float:
    """The accuracy of our method; without it, the best of all."""
    own = metrics["methods"].get(metrics["ours"])
    return float(own["accuracy"] if own else max(m["accuracy"] for m in metrics["methods"].values()))


def of_each(task: str, rows: Mapping[str, Found]) -> Iterator[str]:
    """Each row of one task on its own."""
    drawn: dict[str, str] = {}  # layer errors -> the row that shows them: runs that start alike share them
    for row, found in rows.items():
        title = f"{task}, {row}"
        yield f"<section>{table_html(of_methods(row, found.metrics))}"
        yield pair(
            figure_html(partial(plots.accuracy_against_bytes, found.metrics, title), "Methods, 95 % intervals."),
            *(
                [figure_html(partial(plots.convergence, found.curves, title), "Validation accuracy while training.")]
                if found.curves
                else []
            ),
        )
        same = drawn.setdefault(repr(found.errors), row)
        if found.errors and same == row:
            told = "Relative error of each layer's output on the teacher's inputs, and what the start of the bypass leaves of it."
            yield figure_html(partial(plots.layer_errors, found.errors, title), told)
        elif found.errors:
            yield f"<p>Errors of the layers: as in {escape(same)}.</p>"
        yield "</section>"


def pair(*figures: str) -> str:
    """Figures side by side where there is room."""
    return f"<div class=pair>{''.join(figures)}</div>"


def of_params(experiments: Mapping[str, Experiment]) -> Table:
    """The parameters that differ between experiments."""
    keys = sorted({key for one in experiments.values() for key in one.params})
    table = Table("Parameters that differ", ["experiment", *keys], set(range(len(keys) + 1)))
    table.rows = [[name, *(str(one.params.get(key, "")) for key in keys)] for name, one in experiments.items()]
    return table


def table_html(table: Table) -> str:
    """A table of cells."""

    def row(cells: list[str], kind: str) -> str:
        marks = (
            f"<{kind}{' class=text' if i in table.texts else ''}>{escape(cell)}</{kind}>"
            for i, cell in enumerate(cells)
        )
        return f"<tr>{''.join(marks)}</tr>"

    body = "".join(row(cells, "td") for cells in table.rows)
    notes = "".join(f"<p>{escape(note)}</p>" for note in table.notes)
    return f"<h3>{escape(table.title)}</h3><div class=wide><table><thead>{row(table.header, 'th')}</thead><tbody>{body}</tbody></table></div>{notes}"


def figure_html(draw: Callable[[], Figure], caption: str) -> str:
    """A figure as inline SVG, its lines and letters in the colour of the page's text."""
    file = io.StringIO()
    with matplotlib.rc_context(LOOK):
        draw().savefig(file, format="svg", metadata={"Date": None})
    svg = re.sub(r"^.*?(?=<svg)", "", file.getvalue(), flags=re.S)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r">\s+<", "><", svg)
    for ink in (INK, BLACK, "#000000"):
        svg = svg.replace(ink, "currentColor")
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(caption)}" ', 1)
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"
