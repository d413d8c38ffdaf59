"""Compare experiments: a short table in the terminal, and results/report.html, one page that needs no network."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from calora.artifacts import write_text
from calora.errors import CaloraError
from pipeline.page import Experiment, Found, page

REPORT = Path("results/report.html")
WORKSPACE = "workspace"
WIDE = 160  # columns where the output is no terminal


def files_of(root: Path, name: str) -> Callable[[str], str]:
    """Reads files of the working tree, or of a commit or an experiment, from DVC's cache (or a remote), by their path."""
    from dvc.api import DVCFileSystem

    if name == WORKSPACE:
        return lambda path: (root / path).read_text(encoding="utf-8")
    files = DVCFileSystem(str(root), rev=name)
    return lambda path: str(files.read_text(path, encoding="utf-8"))


def read_experiment(root: Path, name: str) -> Experiment:
    """The results and the parameters of an experiment.

    Raises:
        CaloraError: it has no results.
    """
    try:
        text = files_of(root, name)
        params = yaml.safe_load(text("params.yaml"))
        found = {
            task: {recipe: _found(text, f"{task}/{recipe}") for recipe in params["recipes"]} for task in params["tasks"]
        }
    except Exception as error:  # dvc raises many kinds for "no such commit", "not in the cache", "no such file"
        told = str(error).strip().splitlines() or [type(error).__name__]
        fix = "choose one of `dvc exp list`, or run it again"
        raise CaloraError(f"experiment {name}", "its results", told[0], fix) from None
    return Experiment(found, flat(params))


def _found(text: Callable[[str], str], place: str) -> Found:
    metrics, curves = (json.loads(text(f"models/evaluated/{place}/{part}.json")) for part in ("metrics", "curves"))
    return Found(metrics, curves, json.loads(text(f"models/inherited/{place}/inherit.json")).get("errors", {}))


def flat(params: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Nested sections -> one level of keys with dots."""
    leaves: dict[str, Any] = {}
    for key, value in params.items():
        leaves |= flat(value, f"{above}{key}.") if isinstance(value, dict) else {f"{above}{key}": value}
    return leaves


def differing(experiments: dict[str, Experiment]) -> dict[str, Experiment]:
    """The experiments with only those parameters that are not the same in all."""
    keys = {key for one in experiments.values() for key in one.params}
    differ = [key for key in sorted(keys) if len({repr(one.params.get(key)) for one in experiments.values()}) > 1]
    return {
        name: Experiment(one.found, {key: one.params.get(key, "") for key in differ})
        for name, one in experiments.items()
    }


def compare(root: Path, names: Sequence[str]) -> Path:
    """Print the experiments side by side, and write the page; returns its path."""
    chosen = differing({name: read_experiment(root, name) for name in names})
    console = Console() if sys.stdout.isatty() else Console(width=WIDE)
    console.print(overview(chosen))
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
