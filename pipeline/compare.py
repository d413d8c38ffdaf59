"""Compare experiments: a short table in the terminal, and results/report.html, one page that needs no network."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table

from calora.common.files import write_text
from pipeline.experiment import Experiment, differing, read_experiment
from pipeline.page import page
from pipeline.seeds import over_seeds
from stages.scored import value_of
from stages.tables import short, with_metric

REPORT = Path("results/report.html")
WIDE = 160  # columns where the output is no terminal


def compare(root: Path, names: Sequence[str]) -> Path:
    """Print the experiments side by side, and write the page; returns its path."""
    chosen = differing({name: read_experiment(root, name) for name in names})
    console = Console() if sys.stdout.isatty() else Console(width=WIDE)
    console.print(overview(chosen))
    if means := over_seeds(chosen):
        console.print(Markdown(means.markdown()))
    path = root / REPORT
    write_text(path, page(chosen))
    console.print(f"Report: {path.resolve().as_uri()}", soft_wrap=True)
    return path


def overview(experiments: dict[str, Experiment]) -> Table:
    """A line for each experiment, task and recipe: the methods' scores, what ours gains, and the parameters that differ."""
    params = list(next(iter(experiments.values())).params)
    rows = [
        (name, task, recipe, found.metrics, one.params)
        for name, one in experiments.items()
        for task, recipes in one.found.items()
        for recipe, found in recipes.items()
    ]
    methods = [
        key
        for key in dict.fromkeys(key for *_, metrics, _ in rows for key in metrics["methods"])
        if key == "llm_lora" or key.startswith("clm_")
    ]
    table = Table(box=None, header_style="bold", pad_edge=False)
    heads = [short(key) for key in methods]
    for column in ("experiment", "task", "recipe", *heads, "gain", "MB", *params):
        side: Literal["left", "right"] = "left" if column in ("experiment", "task", "recipe", *params) else "right"
        table.add_column(column, justify=side, overflow="fold", no_wrap=column == "experiment")
    for name, task, recipe, metrics, values in rows:
        found = metrics["methods"]
        scores = [f"{value_of(found[key]):.3f}" if key in found else "" for key in methods]
        gain = f"{metrics['difference']['value']:+.3f}" if "difference" in metrics else ""
        size = f"{found[metrics['ours']]['bytes_on_disk'] / 1e6:.1f}" if metrics["ours"] in found else ""
        table.add_row(
            name, with_metric(task, metrics), recipe, *scores, gain, size, *(str(values[key]) for key in params)
        )
    return table
