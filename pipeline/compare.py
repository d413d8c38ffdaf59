"""Compare experiments: a short table in the terminal, and results/report.html, one page that needs no network."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table

from calora.common.artifacts import write_text
from pipeline.experiment import Experiment, differing, read_experiment
from pipeline.page import page
from pipeline.seeds import over_seeds

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
    """A line for each experiment, task and recipe: accuracies, what CA-LoRA gains, and the parameters that differ."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    keys = list(next(iter(experiments.values())).params)
    for column in ("experiment", "task", "recipe", "LLM+LoRA", "inherited", "LoRA", "CA-LoRA", "gain", "MB", *keys):
        side = "left" if column in ("experiment", "task", "recipe", *keys) else "right"
        table.add_column(column, justify=side, overflow="fold", no_wrap=column == "experiment")
    for name, one in experiments.items():
        for task, recipes in one.found.items():
            for recipe, found in recipes.items():
                methods, gain = found.metrics["methods"], found.metrics["difference"]["value"]
                scores = [
                    f"{methods[m]['accuracy']:.3f}" for m in ("llm_lora", "clm_inherited", "clm_lora", "clm_calora")
                ]
                size = f"{methods['clm_calora']['bytes_on_disk'] / 1e6:.1f}"
                table.add_row(
                    name, task, recipe, *scores, f"{gain:+.3f}", size, *(str(one.params[key]) for key in keys)
                )
    return table
