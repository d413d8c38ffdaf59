"""Fetch a task's texts and split them, and its adapter where the user has one.

Writes data/<task>: task.json; train, validation, test, unlabelled (JSON lines); and models/brought/<task>: the adapter of
teacher.adapters, apart from the texts, so that another one trains nothing again that does not look at it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from calora.adapters.places import CONFIG, LORA, MLX, TOKENIZER, adapter_files
from calora.common.files import fingerprint, read_json, whole_directory, write_json, write_text
from calora.errors import CaloraError
from calora.models.tasks import Task
from stages.common import brought, data, run
from stages.config import DataSet, Imported, ImportedHub, Params
from stages.corpora import SPLITS, split_pools, task_of
from stages.files import Rows, own_path
from stages.sources import snapshot


def main(params: Params, name: str) -> None:
    """The four splits of one task."""
    source = params.data.sets[name]
    task = task_of(name, source)
    pools = split_pools(params, source, task)
    sizes = params.data.sizes
    splits = {split: usable(pools[split], source.has_labels(split))[: getattr(sizes, split)] for split in SPLITS}
    for split in SPLITS:
        if not splits[split]:
            raise nothing(name, split, len(pools[split]), source.has_labels(split))
    taken = {id(row) for row in splits["train"]}
    rest = [strip(row) for row in pools["train"] if id(row) not in taken]
    splits["unlabelled"] = rest[: sizes.unlabelled]
    bring(params.teacher.adapters.get(name), name)
    with whole_directory(data(name)) as scratch:
        write_json(scratch / "task.json", task.to_json())
        for split, rows in splits.items():
            write_text(scratch / f"{split}.jsonl", "".join(json.dumps(finished(row, task)) + "\n" for row in rows))
            print(f"{name}: {len(rows)} {split}{told(split, pools.get(split, []), source)}")


def usable(rows: Rows, labelled: bool) -> Rows:
    """The rows of a split: those with a label, or all of them where the set has none."""
    return [row for row in rows if row["label"] is not None] if labelled else rows


def nothing(name: str, split: str, found: int, labelled: bool) -> CaloraError:
    """What is said of a split without rows."""
    fix = "check its source (a text counts once: in test, else in validation, else in train)"
    if not labelled:
        return CaloraError(f"data.sets.{name}", f"rows for the {split} split", "none", fix)
    if found:
        fix += "; texts without labels are taken where `label` says so: null, or {train: null, test: COLUMN}"
    return CaloraError(
        f"data.sets.{name}", f"labelled rows for the {split} split", f"{found} rows, none with a label", fix
    )


def told(split: str, rows: Rows, source: DataSet) -> str:
    """What is said of labels behind the number of a split's rows."""
    left = sum(row["label"] is None for row in rows)
    if not left or (split == "train" and source.has_labels(split)):
        return ""
    return f" ({left} without a label left out)" if source.has_labels(split) else " (without labels)"


def bring(imported: Imported | ImportedHub | None, name: str) -> None:
    """The user's adapter of a task, or a note that there is none."""
    with whole_directory(brought(name)) as scratch:
        if imported:
            copy_adapter(f"teacher.adapters.{name}", imported, scratch)
        else:
            write_json(scratch / "none.json", {"reason": f"teacher.adapters names none for {name}"})


def copy_adapter(where: str, imported: Imported | ImportedHub, target: Path) -> None:
    """The user's adapter, weights, configuration and tokenizer alone: what `teacher` takes follows from its content."""
    folder = folder_of(where, imported)
    if not folder.is_dir():
        raise CaloraError(where, "a folder that PEFT or mlx-lm wrote", f"a file, {folder}", "name its folder")
    files = adapter_files(folder)
    read_json(files[0], "name a folder that PEFT or mlx-lm wrote")
    for file in (*files, *(folder / name for name in TOKENIZER)):
        if file.exists():
            shutil.copyfile(file, target / file.name)
    found = fingerprint(target)
    if imported.sha256 not in (None, found):
        raise CaloraError(folder, f"weights with fingerprint {imported.sha256}", found, f"put that into {where}")


def folder_of(where: str, imported: Imported | ImportedHub) -> Path:
    """The adapter's folder: the user's, or that of the hub's cache."""
    if isinstance(imported, Imported):
        return own_path(imported.path, where)
    inside = f"{imported.folder}/" if imported.folder else ""
    wanted = [inside + name for name in (CONFIG, LORA, MLX, *TOKENIZER)]
    return snapshot(imported.repo, imported.revision, wanted) / (imported.folder or "")


def strip(row: dict[str, Any]) -> dict[str, Any]:
    """The row without its label."""
    return {**row, "label": None}


def finished(row: dict[str, Any], task: Task) -> dict[str, Any]:
    """The row as it is stored: the columns of prompt and answers, and `label` (an index) or `answer` (a text) where known."""
    stored = {column: row[column] for column in (*task.columns, *task.answer_columns)}
    if row["label"] is not None:
        stored["label" if task.scored else "answer"] = row["label"]
    return stored


if __name__ == "__main__":
    run(main)
