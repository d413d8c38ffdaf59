"""Read corpora and assign each text to one split.

A document is in one split only, told by the hash of its name, and a text that occurs twice counts once: so the
splits are disjoint, they stay as they are when sizes change, and no calibration text is ever a test text.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from calora.errors import CaloraError
from calora.models.tasks import Task
from stages.cells import answer_of, label_of, places_of, text_of
from stages.config import Archive, DataSet, Files, HubData, Params, Scores
from stages.files import Rows, own_path, read_file
from stages.sources import fetch, first_line, read_member

SPLITS = ("train", "validation", "test")
NETWORK = {
    "ConnectionError",
    "ConnectTimeout",
    "TimeoutError",
    "TransportError",
}  # of requests, httpx and Python, by name


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
        pools = _own_splits(source, task, params.data.split.validation, params.data.split.test)
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
    file = fetch(archive.package, archive.version, archive.sha256)
    content = read_member(file, source.member, read_member(file, archive.member))
    rows = []
    for number, line in enumerate(content.decode("utf-8", "replace").rstrip().split("\n"), 1):
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


def _own_splits(source: Files | HubData, task: Task, validation: float, test: float) -> dict[str, Rows]:
    """The rows of each split; those that have no source of their own are split off train, by the hash of their prompt."""
    _check_splits(source, task)
    pools = {split: _labelled(*_read(source, split), source, task, split) for split in SPLITS}
    train = pools["train"]
    shares = (validation if source.validation is None else 0.0, test if source.test is None else 0.0)
    if any(shares):
        names = [split_of(task.render(row), *shares) for row in train]
        pools |= {
            split: [row for row, name in zip(train, names, strict=True) if name == split]
            for split in SPLITS
            if split == "train" or getattr(source, split) is None
        }
    return pools


def _check_splits(source: Files | HubData, task: Task) -> None:
    """Raise where two splits are the same rows: a text is in one split only, so one of them would be empty."""
    taken: dict[Path, str] = {}
    for split in SPLITS:
        name: str | None = getattr(source, split)
        if name is not None:
            own = isinstance(source, Files)
            place = own_path(name, f"data.sets.{task.name}.{split}").resolve() if own else Path(name)
            if place in taken:
                raise CaloraError(
                    f"data.sets.{task.name}",
                    "another source for each split",
                    f"{name} as {taken[place]} and as {split}",
                    "name another, or set `validation` or `test` to null: then it is split off train",
                )
            taken[place] = split


def _read(source: Files | HubData, split: str) -> tuple[str, Rows]:
    """What a message calls a split, and its rows."""
    name: str | None = getattr(source, split)
    if name is None:
        return split, []
    if isinstance(source, Files):
        return name, read_file(Path(name))
    from datasets import load_dataset  # takes a second to import, and files don't need it

    where = f"{source.repo}, split {name}"
    try:
        return where, list(load_dataset(source.repo, source.subset, revision=source.revision, split=name))
    except Exception as error:  # datasets raises many kinds for "not reached", "no such split", "not parsed"
        unanswered = NETWORK & {kind.__name__ for kind in type(error).__mro__}
        expected = "an answer" if unanswered else "rows"
        raise CaloraError(where, expected, first_line(error), "check the source in params.yaml") from None


def _labelled(where: str, rows: Rows, source: Files | HubData, task: Task, split: str) -> Rows:
    """The prompt's columns as texts, and `label`: a place in `labels`, the texts of an answer, or None."""
    places = places_of(source.labels, f"data.sets.{task.name}.labels")
    column = source.label_of(split)
    columns = {name for row in rows for name in row}
    for wanted in (*task.columns, column) if rows else ():
        if wanted not in columns:
            found = f"columns {sorted(columns)}"
            raise CaloraError(where, f"a column '{wanted}'", found, "check prompt and label in params.yaml")
    result = []
    for number, row in enumerate(rows, 1):
        place = f"{where}, row {number}, column"
        texts = {name: text_of(row.get(name)) for name in task.columns}
        for name, text in texts.items():
            if not isinstance(text, str) or not text.strip():
                fix = "give it, or leave out the row"
                raise CaloraError(f"{place} '{name}'", f"text in column '{name}'", repr(text)[:80], fix)
        value, place = row.get(column), f"{place} '{column}'"
        known = label_of(value, places, place) if task.scored else answer_of(value, place)
        result.append({**texts, "label": known})
    return result
