"""Read corpora and assign each text to one split.

A document is in one split only, told by the hash of its name, and a text that occurs twice counts once: so the
splits are disjoint, they stay as they are when sizes change, and no calibration text is ever a test text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from calora.errors import CaloraError, first_line
from calora.models.tasks import AGREEMENT, Task
from stages.cells import answer_of, by_text, choices_of, filled_text, label_of, places_of
from stages.config import Archive, DataSet, Files, HubData, Params, Scores
from stages.files import Rows, own_path, read_file
from stages.sources import fetch, read_member
from stages.tasks import READY

SPLITS = ("train", "validation", "test")
NETWORK = {
    "ConnectionError",
    "ConnectTimeout",
    "TimeoutError",
    "TransportError",
}  # of requests, httpx and Python, by name


def task_of(name: str, source: DataSet) -> Task:
    """The task that a data set defines."""
    more: dict[str, Any] = {"likelihood": source.likelihood, "metrics": source.metrics and tuple(source.metrics)}
    said = {key: value for key, value in more.items() if value is not None}
    if not source.has_labels("test"):
        said["metrics"] = (AGREEMENT,)  # what is right nobody knows
    return Task(name, source.prompt, tuple(source.answers), source.max_tokens, source.max_new_tokens, **said)


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
            columns = dict.fromkeys([*task.columns, *task.answer_columns])
            key = " ".join(" ".join(str(row[c]) for c in columns).lower().split())
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
    pools = {split: _labelled(*_read(source, task, split), source, task, split) for split in SPLITS}
    train = pools["train"]
    shares = (validation if source.validation is None else 0.0, test if source.test is None else 0.0)
    if any(shares):
        names = [split_of(_asked(task, row), *shares) for row in train]
        pools |= {
            split: [row for row, name in zip(train, names, strict=True) if name == split]
            for split in SPLITS
            if split == "train" or getattr(source, split) is None
        }
    return pools


def _asked(task: Task, row: dict[str, Any]) -> str:
    """The prompt of a row, with its answers where they are its own: COPA asks the same of many."""
    return task.render(row) + ("".join(task.choices(row)) if task.answer_columns else "")


def _check_splits(source: Files | HubData, task: Task) -> None:
    """Raise where two splits are the same rows: a text is in one split only, so one of them would be empty."""
    taken: dict[Path, str] = {}
    for split in SPLITS:
        name = getattr(source, split)
        if name is not None:
            own = isinstance(source, Files)
            name = str(_file(name, f"data.sets.{task.name}.{split}")) if own else name
            place = Path(name).resolve() if own else Path(name)
            if place in taken:
                raise CaloraError(
                    f"data.sets.{task.name}",
                    "another source for each split",
                    f"{name} as {taken[place]} and as {split}",
                    "name another, or set `validation` or `test` to null: then it is split off train",
                )
            taken[place] = split


def _file(names: str | list[str], where: str) -> Path:
    """The path inside own/ of a file; of several names the one that is there, compressed or not."""
    if isinstance(names, str):
        return own_path(names, where)
    found = [path for name in names for path in (name, f"{name}.gz") if Path(path).exists()]
    if found:
        return own_path(found[0], where)
    folder = Path(names[0]).parent
    there = ", ".join(sorted(path.name for path in folder.glob("*"))[:12]) or "nothing"
    expected = " or ".join(Path(name).name for name in names) + f" (.gz too) in {folder}"
    fix = f"put the official file there, or name yours, as stages/{READY.name} has them: `{where.rsplit('.', 1)[-1]}: {folder}/FILE`"
    raise CaloraError(where, expected, there, fix)


def _read(source: Files | HubData, task: Task, split: str) -> tuple[str, Rows]:
    """What a message calls a split, and its rows."""
    name = getattr(source, split)
    if name is None:
        return split, []
    if isinstance(source, Files):
        path = _file(name, f"data.sets.{task.name}.{split}")
        return str(path), read_file(path, source.header)
    from datasets import load_dataset  # takes a second to import, and files don't need it

    where = f"{source.repo}, split {name}"
    try:
        return where, list(load_dataset(source.repo, source.subset, revision=source.revision, split=name))
    except Exception as error:  # datasets raises many kinds for "not reached", "no such split", "not parsed"
        unanswered = NETWORK & {kind.__name__ for kind in type(error).__mro__}
        expected = "an answer" if unanswered else "rows"
        raise CaloraError(where, expected, first_line(error), "check the source in params.yaml") from None


def _labelled(where: str, rows: Rows, source: Files | HubData, task: Task, split: str) -> Rows:
    """The columns of prompt and answers as texts, and `label`: a place in `labels`, the texts of an answer, or None."""
    places = places_of(source.labels, f"data.sets.{task.name}.labels")
    if not rows:
        return []
    known = {name for row in rows for name in row}
    columns = dict.fromkeys([*task.columns, *task.answer_columns])
    called = {name: _called(source.columns.get(name, [name]), known, where) for name in columns}
    names_of_label, listed = source.labels_of(split), task.answer_columns[0] if task.listed else None
    label = _called(names_of_label, known, where) if names_of_label else None
    result: Rows = []
    for number, row in enumerate(rows, 1):
        place = f"{where}, row {number}, column"
        read: dict[str, Any] = {
            name: (choices_of if name == listed else filled_text)(row.get(column)) for name, column in called.items()
        }
        wrong = [name for name, found in read.items() if found is None]
        if wrong and source.incomplete == "leave_out":
            continue
        for name in wrong:
            raise _without_text(place, row, called[name], name == listed)
        own = places
        if listed:
            read[listed], names = read[listed]
            every = places or {**by_text(read[listed]), **places_of(names, f"{place} '{called[listed]}'")}
            own = {key: at for key, at in every.items() if at < len(names)}
        elif task.answer_columns and not places:
            own = by_text(task.choices(read))
        result.append({**read, "label": _told(row, label, own, task, source, place)})
    if len(result) < len(rows):
        print(f"{task.name}: {len(rows) - len(result)} rows of {where} without a text left out")
    return result


def _told(
    row: dict[str, Any], label: str | None, places: dict[str, int], task: Task, source: Files | HubData, place: str
) -> Any:
    """The label of a row, or the texts of its answer; None where there is none."""
    if label is None:
        return None
    value, place = row.get(label), f"{place} '{label}'"
    return label_of(value, places, place, source.missing) if task.scored else answer_of(value, place)


def _without_text(place: str, row: dict[str, Any], column: str, listed: bool) -> CaloraError:
    expected = "two texts or more: [...], or {text: [...], label: [...]}" if listed else f"text in column '{column}'"
    fix = "give it, leave out the row, or say `incomplete: leave_out`"
    return CaloraError(f"{place} '{column}'", expected, repr(row.get(column))[:80], fix)


def _called(names: Sequence[str], known: Collection[str], where: str) -> str:
    """Under which of its names the rows have a column."""
    for name in names:
        if name in known:
            return name
    wanted, found = " or ".join(f"'{name}'" for name in names), f"columns {sorted(known)}"
    raise CaloraError(
        where, f"a column {wanted}", found, "check prompt, columns and label in params.yaml (`label: null`: no labels)"
    )
