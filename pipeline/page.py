"""One self-contained page of results: no script, no network, light and dark, and readable in print."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from matplotlib.figure import Figure

from pipeline.experiment import Experiment, Found
from pipeline.seeds import over_seeds
from stages import plots
from stages.looks import BLACK, METRICS
from stages.means import over_tasks
from stages.scored import metric_of, value_of
from stages.tables import Table, of_methods, of_runs

INK = "#010203"  # stands for the colour of the page's text, which a viewer's light or dark setting decides
LOOK: dict[Any, Any] = {
    "svg.fonttype": "none", "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "savefig.transparent": True, "svg.hashsalt": "calora",
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color"), INK),
    "legend.facecolor": "none", "legend.edgecolor": INK, "legend.framealpha": 0,
}  # fmt: skip
DETAILED = 24  # runs, tasks and recipes counted apart: with the figures of each, the page has 2.4 MB then


@dataclass(frozen=True)
class Shown:
    """A figure as inline SVG, and what stands below it."""

    svg: Markup
    caption: str


@dataclass(frozen=True)
class Part:
    """A task, with its runs, or one run: a table and figures; `as_in` names the run that shows the same layer errors."""

    name: str
    table: Table
    figures: list[Shown]
    runs: list[Part] = field(default_factory=list)
    as_in: str = ""


def page(experiments: Mapping[str, Experiment]) -> str:
    """The HTML of one experiment or of several, by name."""
    runs = sum(len(recipes) for one in experiments.values() for recipes in one.found.values())
    tables = [of_params(experiments)] if any(one.params for one in experiments.values()) else []
    if means := over_seeds(experiments):
        tables.append(means)
    tasks = []
    if len(same := {tuple(one.found) for one in experiments.values()}) == 1 and len(names := next(iter(same))) > 1:
        means_of_runs = {name: means_of(one.found) for name, one in experiments.items()}
        rows, alone = rows_of(means_of_runs), len(means_of_runs) == 1
        tasks.append(of_task(f"mean of {len(names)} tasks", rows, alone=alone, detailed=False))
    for task in dict.fromkeys(task for one in experiments.values() for task in one.found):
        chosen = {name: one.found[task] for name, one in experiments.items() if task in one.found}
        tasks.append(of_task(task, rows_of(chosen), alone=len(chosen) == 1, detailed=runs <= DETAILED))
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    left_out = runs if runs > DETAILED else 0
    return environment.get_template("page.html").render(
        tables=tables, tasks=tasks, left_out=left_out, detailed=DETAILED
    )


def rows_of(experiments: Mapping[str, Mapping[str, Found]]) -> dict[str, Found]:
    """What experiments found on one task, under the name of the recipe, and of the experiment where there are several."""
    return {
        recipe if len(experiments) == 1 else f"{name}: {recipe}": found
        for name, recipes in experiments.items()
        for recipe, found in recipes.items()
    }


def means_of(found: Mapping[str, Mapping[str, Found]]) -> dict[str, Found]:
    """Recipe -> the mean over the tasks of one experiment."""
    recipes = next(iter(found.values()))
    return {
        recipe: Found(over_tasks([of_task[recipe].metrics for of_task in found.values()]), {}) for recipe in recipes
    }


def of_task(task: str, rows: Mapping[str, Found], alone: bool, detailed: bool) -> Part:
    """All rows of one task together: the recipes of one experiment, or several experiments, the best first."""
    metrics = {row: found.metrics for row, found in rows.items()}
    table = of_runs("Before and after CA-LoRA", "recipe" if alone else "experiment: recipe", metrics)
    if alone:
        first = shown(partial(plots.recipes_against_bytes, metrics, task), "Each recipe: inherited LoRA to CA-LoRA.")
    else:
        scores = {row: compared(metrics[row]) for row in sorted(rows, key=lambda row: -best(metrics[row]))}
        metric = metric_of(next(iter(metrics.values())))
        first = shown(partial(plots.ranking, scores, task, metric), "Each run, the best first, with 95 % intervals.")
    front = shown(partial(plots.front, metrics, task), "Every method; the line is the best score for the bytes.")
    return Part(task, table, [first, front], list(of_each(task, rows)) if detailed else [])


def compared(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The baseline and our method, those of the two that there are."""
    return {key: metrics["methods"][key] for key in (metrics["baseline"], metrics["ours"]) if key in metrics["methods"]}


def best(metrics: Mapping[str, Any]) -> float:
    """The score of our method; without it, the best of all."""
    own = metrics["methods"].get(metrics["ours"])
    return value_of(own) if own else max(map(value_of, metrics["methods"].values()))


def of_each(task: str, rows: Mapping[str, Found]) -> Iterator[Part]:
    """Each row of one task on its own."""
    drawn: dict[str, str] = {}  # layer errors -> the row that shows them: runs that start alike share them
    for row, found in rows.items():
        title, metric = f"{task}, {row}", metric_of(found.metrics)
        figures = [shown(partial(plots.accuracy_against_bytes, found.metrics, title), "Methods, 95 % intervals.")]
        if found.curves:
            figures.append(
                shown(
                    partial(plots.convergence, found.curves, title, metric),
                    f"Validation {METRICS[metric]} while training.",
                )
            )
        same = drawn.setdefault(repr(found.errors), row)
        if found.errors and same == row:
            caption = "Relative error of each layer's output on the teacher's inputs, and what the start of the bypass leaves of it."
            figures.append(shown(partial(plots.layer_errors, found.errors, title), caption))
        yield Part(row, of_methods(row, found.metrics), figures, as_in=same if found.errors and same != row else "")


def of_params(experiments: Mapping[str, Experiment]) -> Table:
    """The parameters that differ between experiments."""
    keys = sorted({key for one in experiments.values() for key in one.params})
    table = Table("Parameters that differ", ["experiment", *keys], set(range(len(keys) + 1)))
    table.rows = [[name, *(str(one.params.get(key, "")) for key in keys)] for name, one in experiments.items()]
    return table


def shown(draw: Callable[[], Figure], caption: str) -> Shown:
    """A figure as inline SVG, its lines and letters in the colour of the page's text."""
    file = io.StringIO()
    with matplotlib.rc_context(LOOK):
        draw().savefig(file, format="svg", metadata={"Date": None})
    svg = re.sub(r"^.*?(?=<svg)", "", file.getvalue(), flags=re.S)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r">\s+<", "><", svg)
    for ink in (INK, BLACK, "#000000"):
        svg = svg.replace(ink, "currentColor")
    return Shown(Markup(svg.replace("<svg ", f'<svg role="img" aria-label="{escape(caption)}" ', 1)), caption)
