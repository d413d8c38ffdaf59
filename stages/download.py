"""Fetch a task's texts and split them. Writes data/<task>: task.json, train, validation, test, unlabelled (JSON lines)."""

from __future__ import annotations

import json
from typing import Any

from calora.common.artifacts import whole_directory, write_json, write_text
from calora.errors import CaloraError
from calora.models.tasks import Task
from stages.common import data, run
from stages.config import Params
from stages.corpora import split_pools, task_of


def main(params: Params, name: str) -> None:
    """The four splits of one task."""
    source = params.data.sets[name]
    task = task_of(name, source)
    pools = split_pools(params, source, task)
    sizes = params.data.sizes
    labelled = [row for row in pools["train"] if row["label"] is not None]
    train = labelled[: sizes.train]
    taken = {id(row) for row in train}
    rest = [strip(row) for row in pools["train"] if id(row) not in taken]
    splits = {
        "train": train,
        "validation": [row for row in pools["validation"] if row["label"] is not None][: sizes.validation],
        "test": [row for row in pools["test"] if row["label"] is not None][: sizes.test],
        "unlabelled": rest[: sizes.unlabelled],
    }
    for split in ("train", "validation", "test"):
        if not splits[split]:
            raise CaloraError(f"data.sets.{name}", f"rows for the {split} split", "none", "check its source and sizes")
    with whole_directory(data(name)) as scratch:
        write_json(scratch / "task.json", task.to_json())
        for split, rows in splits.items():
            write_text(scratch / f"{split}.jsonl", "".join(json.dumps(finished(row, task)) + "\n" for row in rows))
            print(f"{name}: {len(rows)} {split}")


def strip(row: dict[str, Any]) -> dict[str, Any]:
    """The row without its label."""
    return {**row, "label": None}


def finished(row: dict[str, Any], task: Task) -> dict[str, Any]:
    """The row as it is stored: the prompt's columns, and `label` (an index) or `answer` (a text) where known."""
    stored = {column: row[column] for column in task.columns}
    if row["label"] is not None:
        stored["label" if task.scored else "answer"] = row["label"]
    return stored


if __name__ == "__main__":
    run(main)
