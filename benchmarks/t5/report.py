"""The tables of docs/t5.md, of the run in the benchmark's folder: every seed that was run is kept in docs/t5.json."""

from __future__ import annotations

import contextlib
import json

from benchmarks.recipes import Results, between, hits, merge, of_one, of_task, said
from benchmarks.t5.project import FOLDER, TASKS
from calora.common.files import write_text
from pipeline.settings import ROOT
from stages.tables import Table, interval, short

PAGE, DATA = ROOT / "docs/t5.md", ROOT / "docs/t5.json"
METHODS = ("clm_inherited", "clm_lora", "clm_calora")
TEACHER, SMALL, BASE = ("", "llm_lora"), ("", "small_lora"), ("", "llm")


def lost_table(found: Results) -> Table:
    """A line for each recipe and method: every task, their mean, and what it is from the teacher's, in pairs."""
    head = ["recipe", "method", "MB", *found.tasks, "mean", "95 % interval", "- teacher"]
    table = Table("recipes", head, {0, 1, len(head) - 2, len(head) - 1})
    for recipe, method in [BASE, TEACHER, SMALL, *((recipe, name) for recipe in found.recipes for name in METHODS)]:
        key, rows = (recipe, method), found.rows((recipe, method))
        mean = found.mean(key)
        if mean is None:
            continue
        size = f"{of_one(found, key)['bytes_on_disk'] / 1e6:.1f}"
        each = [f"{of_task([hits(one) for one in rows[task].values()]).value:.3f}" for task in found.tasks]
        gap = "" if key == TEACHER else said(found.difference(key, TEACHER))
        cells = [size, *each, f"{mean.value:.3f}", interval(mean.ci), gap]
        table.rows.append([recipe or "uncompressed", short(method), *cells])
    return table


def write() -> None:
    """Merge the run, then write data and page."""
    data = json.loads(DATA.read_text(encoding="utf-8")) if DATA.exists() else {}
    with contextlib.chdir(FOLDER):
        found = Results(merge(data), tuple(TASKS))
        table = lost_table(found)
    write_text(DATA, json.dumps(found.data, indent=1, sort_keys=True) + "\n")
    write_text(PAGE, between(PAGE.read_text(encoding="utf-8"), table.title, table.grid(), "benchmarks.t5"))
