"""Read what the download stages wrote: a task, its splits, and the calibration texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from calora.common.files import read_json
from calora.errors import CaloraError
from calora.models.tasks import Example, Row, Task, read_rows
from stages.common import CALIBRATION, METHODS, data, labels, written

WRITTEN, TARGETS = "texts.jsonl", "targets"  # in models/written/<task>/<method>


def read_task(name: str) -> Task:
    """The task that the download stage wrote."""
    return Task.from_json(read_json(data(name) / "task.json", f"run `dvc repro download@{name}`"))


def read_split(name: str, split: str) -> list[dict[str, Any]]:
    """Rows of a split; only the unlabelled one may be empty."""
    path = data(name) / f"{split}.jsonl"
    if split == "unlabelled" and path.exists() and path.stat().st_size == 0:
        return []
    return read_rows(path, f"run `dvc repro download@{name}`")


def has_labels(rows: Sequence[Row]) -> bool:
    """Whether the rows of a split have labels or answers: all of them have, or none."""
    return any(key in rows[0] for key in ("label", "answer"))


def read_checked(name: str, split: str) -> list[dict[str, Any]]:
    """Rows of validation or test with their labels; where the set has none, with the teacher's answers in their place."""
    rows = read_split(name, split)
    if has_labels(rows):
        return rows
    path = labels(name) / f"{split}.jsonl"
    made_by = f"run `dvc repro teacher@{name}`"
    said = read_rows(path, made_by)
    if len(said) != len(rows):
        raise CaloraError(path, f"an answer of the teacher for each of {len(rows)} texts", len(said), made_by)
    return [{**row, **one} for row, one in zip(rows, said, strict=True)]


def texts_of(method: str) -> str:
    """Which texts a method knows: those of the task, or `written` ones."""
    return str(read_json(METHODS / method / "texts.json", "run `dvc repro methods`")["texts"])


def read_written(name: str, method: str) -> list[dict[str, Any]]:
    """The rows that the teacher wrote for a method, without labels."""
    return read_rows(written(name, method) / WRITTEN, f"run `dvc repro write@{name}-{method}`")


def read_calibration(tokenizer: Any, path: Path = CALIBRATION) -> list[Example]:
    """The texts that compression is fitted to, or those of TUNING."""
    return [Example(tokenizer(row["text"]).input_ids) for row in read_rows(path, "run `dvc repro calibration`")]
