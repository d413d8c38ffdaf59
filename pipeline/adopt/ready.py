"""Data of a task that stages/tasks.yaml has ready: an entry of a line, asked and scored as it is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from pipeline.adopt.files import Source
from pipeline.adopt.wanted import Entry, Wanted
from stages.config import ANY_SET, Files, HubData
from stages.corpora import task_of


def ready(name: str, before: Mapping[str, Any], source: Source, wanted: Wanted) -> Files | HubData | None:
    """The task that the entry of `before` is like, in full, if the data have its columns and nobody says otherwise."""
    if "like" not in before or wanted.answers or wanted.label or wanted.columns:
        return None
    splits = ("train", "validation", "test", "repo", "revision", "subset")
    try:
        made = ANY_SET.validate_python(
            {**{k: v for k, v in before.items() if k not in splits}, "folder": f"own/{name}"}
        )
    except ValidationError:
        return None
    assert isinstance(made, Files)
    train = source.rows["train"]
    known = {column for row in train for column in row}
    task = task_of(name, made)
    needed = [made.columns.get(column, [column]) for column in (*task.columns, *task.answer_columns)]
    return made if all(known & set(names) for names in (*needed, made.labels_of("train"))) else None


def entry_of(
    made: Files | HubData, before: Mapping[str, Any], source: Entry, places: Mapping[str, str | None]
) -> Entry:
    """The entry of params.yaml: `like`, where its files or splits are, and what was said beside it before."""
    kept = {key: value for key, value in before.items() if key not in ("folder", "repo", "revision", "subset", *places)}
    if source["source"] == "hub":
        return {**kept, **{key: value for key, value in source.items() if key != "source"}, **places}
    folder = str(next(place for place in places.values() if place)).rpartition("/")[0]
    files = {split: place.rpartition("/")[2] for split, place in places.items() if place}
    return {**kept, "folder": folder, **files}


def renamed(made: Files | HubData, rows: Sequence[Entry], columns: Sequence[str]) -> list[Entry]:
    """Rows with the columns of prompt and answers under the names that those have."""
    known = {column for row in rows for column in row}
    called = {name: next((one for one in made.columns.get(name, [name]) if one in known), name) for name in columns}
    return [{**row, **{name: row.get(theirs) for name, theirs in called.items()}} for row in rows]
