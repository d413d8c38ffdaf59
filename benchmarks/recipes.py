"""Write the tables and the pictures of docs/results.md from the results of this folder: `python -m benchmarks.recipes [task]`.

Run it after `make run` with some `recipes`; those that this folder has no results of stay as docs/recipes.json has them, so that the
nine can be run on different days.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from calora.common.files import read_json, write_json, write_text
from stages import plots, tables
from stages.common import BASE, compressed, results
from stages.config import load_params

PAGE, DATA = Path("docs/results.md"), Path("docs/recipes.json")
PICTURES = {Path("docs/recipes.png"): plots.recipes_against_bytes, Path("docs/front.png"): plots.front}
ORDER = ("q8", "q4", "q3", "q4_2", "q2", "nf4", "up", "sp", "m", "q8_up", "q4_up", "q8_up_m")
MARKS = "<!-- {} of benchmarks.recipes -->"


def bytes_table(found: dict[str, Any]) -> tables.Table:
    """Size of each compressed base's weights against the uncompressed ones."""
    rows = [[name, f"{one['bytes'] / 1e6:.1f}", f"{one['share']:.3f}"] for name, one in found.items()]
    return tables.Table("bytes", ["recipe", "MB", "share"], {0}, rows)


def between(text: str, name: str, new: str) -> str:
    """The text with what stands between two marks replaced."""
    first, last = MARKS.format(f"start: {name}"), MARKS.format(f"end: {name}")
    head, _, rest = text.partition(first)
    return f"{head}{first}\n{new}\n{last}{rest.partition(last)[2]}"


def main() -> None:
    """Merge, then write data, page and pictures."""
    task = sys.argv[1] if len(sys.argv) > 1 else "movies"
    known: dict[str, Any] = json.loads(DATA.read_text()) if DATA.exists() else {}
    for recipe in load_params().compressions:
        path = results(task, recipe, "metrics.json")
        if path.exists():
            size = (compressed(recipe) / "model.safetensors").stat().st_size
            share = round(size / (BASE / "model.safetensors").stat().st_size, 4)
            known[recipe] = {"bytes": size, "share": share, "metrics": read_json(path, "run `make run`")}
    found = {recipe: known[recipe] for recipe in ORDER if recipe in known}
    metrics = {recipe: one["metrics"] for recipe, one in found.items()}
    table = tables.of_runs(task, "recipe", metrics)
    write_json(DATA, found)
    text = between(PAGE.read_text(encoding="utf-8"), "table", table.grid())
    write_text(PAGE, between(text, "bytes", bytes_table(found).grid()))
    for path, draw in PICTURES.items():
        draw(metrics, task).savefig(path, dpi=130)


if __name__ == "__main__":
    main()
