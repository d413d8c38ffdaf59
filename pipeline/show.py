"""What a run shows in the Prefect UI: the table of methods, the difference to its parent, pictures, and the report page."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_table_artifact,
)

from calora.common.files import write_text
from calora.errors import CaloraError
from pipeline.experiment import WORKSPACE, Experiment, differing, flat, read_experiment
from pipeline.page import page
from stages import plots

REPORTS = Path(".cache/reports")
SERVED = "CALORA_REPORTS_URL"  # where `make ui` serves that folder


def show_results(root: Path, folder: Path, parent: str, name: str) -> None:
    """Artifacts of a finished run; its results are kept in .cache/reports/<experiment>."""
    results = folder / "results"
    create_markdown_artifact(
        (results / "table.md").read_text(encoding="utf-8"), key="methods", description=f"Methods of {name}"
    )
    before = subprocess.run(
        ["git", "show", f"{parent}:./results/summary.json"], cwd=root, capture_output=True, text=True
    ).stdout
    after = json.loads((results / "summary.json").read_text(encoding="utf-8"))
    create_table_artifact(
        difference(json.loads(before or "{}"), after), key="difference", description=f"{name} against {parent[:10]}"
    )
    kept = root / REPORTS / name
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(results / "plots", kept / "plots")
    for losses in sorted(results.glob("*/*/curves/*/train")):
        task, recipe, _, method = losses.parts[-5:-1]
        figure = plots.losses(loss_parts(losses), f"{task}, {recipe}, {method}")
        figure.savefig(kept / f"plots/{task}-{recipe}-{method}-loss.png", dpi=130)
    write_text(
        kept / "report.html", page(differing(with_parent(root, parent) | {name: read_experiment(folder, WORKSPACE)}))
    )
    url = os.environ.get(SERVED)
    if url:
        create_link_artifact(
            f"{url}/{name}/report.html", link_text=f"Report of {name}", key="report", description=f"Report of {name}"
        )
        for picture in sorted((kept / "plots").glob("*.png")):
            address = f"{url}/{name}/plots/{picture.name}"
            create_image_artifact(address, key=key_of(picture.stem), description=picture.stem)


def loss_parts(losses: Path) -> dict[str, list[tuple[int, float]]]:
    """Part of the loss -> (step, value), of the tables that `distill` writes."""
    tables = {file.stem: file.read_text(encoding="utf-8").splitlines()[1:] for file in losses.glob("*.tsv")}
    return {
        part: [(int(step), float(value)) for step, value in (line.split("\t") for line in lines)]
        for part, lines in tables.items()
    }


def key_of(name: str) -> str:
    """A name as the key of an artifact: Prefect takes small letters, digits and dashes."""
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


def with_parent(root: Path, parent: str) -> dict[str, Experiment]:
    """The results of the parent commit, if it has any that are at hand."""
    try:
        return {f"parent {parent[:10]}": read_experiment(root, parent)}
    except CaloraError:
        return {}


def difference(before: dict[str, Any], after: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of task, recipe, metric, and its values in the parent commit and in this run."""
    return [
        {
            "task": task, "recipe": recipe, "metric": metric, "before": old, "after": new,
            "change": round(new - old, 4) if isinstance(old, int | float) and isinstance(new, int | float) else "",
        }
        for task, recipes in after.items()
        for recipe, metrics in recipes.items()
        for metric, new in flat(metrics).items()
        for old in [flat(before.get(task, {}).get(recipe, {})).get(metric, "")]
    ]  # fmt: skip
