"""What each kind of supervision gives: labels, unlabelled texts, texts that the teacher wrote, no step at all.

`python -m benchmarks.supervision`, after `make run` with the methods of ROWS in `compare`: it merges the run in this folder
into docs/recipes.json, as `benchmarks.recipes` does, and writes the table of docs/results.md.
"""

from __future__ import annotations

import json

from benchmarks.recipes import DATA, PAGE, Key, Results, between, hits, merge, of_task, said
from calora.common.files import write_text
from stages.config import load_params
from stages.looks import key_of
from stages.tables import Table, interval

NAME, TEACHER, LABELS = "supervision", ("", "llm_lora"), "calora"
ROWS = {  # method -> what it learns from
    "calora": "labels, unlabelled texts",
    "calora_unlabelled": "unlabelled texts",
    "calora_written": "texts that the teacher wrote",
    "calora_free": "no step: closed form, from texts of the task",
    "calora_written_free": "no step: closed form, from written texts",
    "clm_inherited": "nothing: the LoRA as it was",
}


def supervision_table(found: Results) -> Table:
    """A line for each recipe and method: each task, the mean, and the paired difference to labels and to the teacher."""
    heads = ["recipe", "learns from", *found.tasks, "mean", "95 % interval", "- labels", "- teacher", "seeds"]
    table = Table(NAME, heads, {0, 1, *range(len(found.tasks) + 3, len(heads))})
    keys: list[tuple[Key, str]] = [(TEACHER, "the teacher, on the uncompressed base")]
    keys += [((recipe, key_of(method)), says) for recipe in found.recipes for method, says in ROWS.items()]
    for key, says in keys:
        rows, mean = found.rows(key), found.mean(key)
        if not rows:
            continue
        cells = [
            f"{of_task([hits(one) for one in rows[task].values()]).value:.3f}" if task in rows else ""
            for task in found.tasks
        ]
        labels = (
            found.difference(key, (key[0], key_of(LABELS))) if key != TEACHER and key[1] != key_of(LABELS) else None
        )
        teacher = found.difference(key, TEACHER) if key != TEACHER else None
        ends = [f"{mean.value:.3f}", interval(mean.ci)] if mean else ["", ""]
        seeds = sorted({seed for of in rows.values() for seed in of})
        table.rows.append(
            [key[0] or "uncompressed", says, *cells, *ends, said(labels), said(teacher), ", ".join(seeds)]
        )
    return table


def main() -> None:
    """Merge, then write data and table."""
    load_params()  # a mistake in it is told first
    data = merge(json.loads(DATA.read_text(encoding="utf-8")) if DATA.exists() else {})
    write_text(DATA, json.dumps(data, indent=1, sort_keys=True) + "\n")
    text = PAGE.read_text(encoding="utf-8")
    write_text(PAGE, between(text, NAME, supervision_table(Results(data)).grid(), "benchmarks.supervision"))


if __name__ == "__main__":
    main()
