"""Which split is which, and where each has its labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from calora.errors import CaloraError
from pipeline.adopt.columns import LABELS, columns_of, known, label_column
from pipeline.adopt.files import Source
from pipeline.adopt.wanted import Entry, Said, Wanted, shown
from stages.corpora import SPLITS
from stages.files import read_file


def keep_splits(source: Source, before: Mapping[str, Any], name: str) -> None:
    """The validation and test files of an earlier run, where the training file is the same and no other is named."""
    train = source.places["train"]
    folder = f"{before['folder']}/" if before.get("folder") else ""
    same = isinstance(train, Path) and f"{folder}{before.get('train')}" in (f"own/{name}/{train.name}", shown(train))
    if not same:
        return
    for split in ("validation", "test"):
        kept = Path(f"{folder}{before[split]}") if before.get(split) else None
        if split not in source.rows and kept and kept.exists():
            source.places[split], source.rows[split] = kept, read_file(kept, source.entry.get("header"))


def named_label(source: Source, wanted: Wanted, before: Mapping[str, Any], taught: bool) -> str | None:
    """The label's column: given, or as it was, or told from the training rows; None where there is an adapter and no label.

    Of texts without labels it is what another file calls it.
    """
    kept = before.get("label")
    kept = kept.get("train") or kept.get("test") if isinstance(kept, Mapping) else kept
    having = {name for rows in source.rows.values() for row in rows for name in row}
    given = wanted.label or (str(kept) if kept in having else None)
    train = source.rows["train"]
    if taught and given in having and not any(given in row for row in train):
        return given
    return label_column(train, given, columns_of(wanted.prompt or ""), taught)


def with_label(rows: Sequence[Entry], theirs: str | None, ours: str | None) -> list[Entry]:
    """Rows whose label's column is called as it is in train."""
    return list(rows) if theirs == ours or ours is None else [{**row, ours: row.get(theirs or "")} for row in rows]


def tested(
    source: Source, column: str | None, taught: bool, said: Said
) -> tuple[dict[str, str], dict[str, str | None]]:
    """Split of the task -> split of the source, and split of the source -> its label's column, if it has one.

    A test set without labels, as GLUE's are, leaves its place to the validation set.
    """
    label = {split: _label_in(rows, column) for split, rows in source.rows.items()}
    labelled = [
        split for split, rows in source.rows.items() if any(_is_label(row.get(label[split] or "")) for row in rows)
    ]
    if "train" not in labelled:
        if not taught:
            raise CaloraError("--data", f"labels in column '{column}'", "none", "give --label")
        return _untaught(source, label, labelled, said)
    splits = {split: split for split in SPLITS if split in labelled}
    if "test" in splits:
        return splits, label
    missing = "the test set has no labels" if "test" in source.rows else "there is no test set"
    if "validation" in splits:
        splits["test"] = splits.pop("validation")
        said.unsure.append(f"{missing}: the validation set is the test set, and validation is split off train")
    else:
        said.unsure.append(f"{missing}: it is split off train, as is validation (shares: data.split)")
    return splits, label


def _untaught(
    source: Source, label: Mapping[str, str | None], labelled: Sequence[str], said: Said
) -> tuple[dict[str, str], dict[str, str | None]]:
    """The same for texts without labels, from which the adapter's answers are learnt; a labelled set is the test set."""
    tested = next((split for split in ("test", "validation") if split in labelled), None)
    splits = {split: split for split in SPLITS if split in source.rows and split != tested}
    if tested:
        splits = {"train": "train", "test": tested}
    how = f"the {tested} set's are what is scored" if tested else "agreement with the adapter is what is scored"
    said.unsure.append(f"the texts to learn from have no labels: the adapter's answers stand for them; {how}")
    return splits, {split: label[split] if split == tested else None for split in source.rows}


def _label_in(rows: Sequence[Entry], column: str | None) -> str | None:
    """The label's column in a file that may call it otherwise."""
    columns = {name for row in rows for name in row}
    return next((name for name in (column, *LABELS) if name in columns), column)


def _is_label(value: Any) -> bool:
    return bool(value) if isinstance(value, list | dict) else known(value) not in (None, "-1")


def label_entry(splits: Mapping[str, str], label: Mapping[str, str | None]) -> Any:
    """`label` of the entry: one name, one for each split, or null where there are no labels."""
    named = {split: label[place] for split, place in splits.items()}
    if len(set(named.values())) == 1:
        return named["train"]
    return {split: name for split, name in named.items() if name or split == "train"}
