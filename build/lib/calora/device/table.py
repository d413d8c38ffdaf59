"""`calora classify`: every row of a CSV file answered by an adapter, resumed where it was stopped."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from calora.common.files import sha256, write_text
from calora.common.progress import progress
from calora.device.catalogue import BASE_NAME, Catalogue, Model, NoSuchModel
from calora.device.choose import scored_task
from calora.errors import CaloraError
from calora.evaluation.choice import Choice, columns_of
from calora.models.tasks import Row, Task

LABEL, PROBABILITY = "label", "probability"  # columns that are added, or replaced
CHUNK = 32  # rows that are answered together; what is done of them is lost in an interruption


class Chooser(Protocol):
    """A model with an active adapter."""

    def choose(self, texts: Sequence[Row]) -> list[Choice]:
        """An answer to each row."""


def classify_table(
    task: Task,
    identity: Sequence[str],
    opened: Callable[[], Chooser],
    file: Path,
    out: Path,
    columns: Mapping[str, str],
) -> dict[str, int]:
    """Write a CSV file with the rows of another one, the answer to each, and its probability.

    What is done is kept in a hidden file beside `out` until all is; the same call goes on from there.

    Args:
        task: of the adapter.
        identity: what tells this base and adapter from others.
        opened: opens the model, with the adapter active.
        file: CSV in UTF-8, with a header.
        out: the file to write.
        columns: column of the prompt -> its header in the file, where that is another one.

    Returns:
        How often each answer was given.

    Raises:
        CaloraError: the task or a row is not what it should be.
    """
    header, table = read_table(file)
    rows = _rows(task, file, header, table, columns)
    if out.exists() and out.samefile(file):
        raise CaloraError(out, "another file than the one that is read", "the same", "name another --out")
    if not out.parent.is_dir():
        raise CaloraError(out, "a folder that exists", "none", "make it, or name another --out")
    same = [sha256(file), *identity, columns, task.to_json()]
    mark = hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:12]
    partial = out.with_name(f".{out.name}.{mark}.partial")  # another input, adapter or export has another one
    done = _done(partial)
    if len(done) < len(rows):
        _answer(opened(), task.name, rows, done, partial)
    write_text(out, _text(header, table, done))
    partial.unlink(missing_ok=True)
    return dict(Counter(one[LABEL] for one in done))


def read_table(file: Path) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a CSV file; raises `CaloraError` where it is none."""
    fix = "name a CSV file in UTF-8 with a header"
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            table = [row for row in csv.reader(stream, strict=True) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CaloraError(file, "a CSV file in UTF-8", error, fix) from None
    if len(table) < 2:
        raise CaloraError(file, "a header and a row or more", f"{len(table)} rows", fix)
    header, *rows = table
    if len(set(header)) < len(header):
        raise CaloraError(file, "a header without a name twice", ", ".join(header), fix)
    for number, row in enumerate(rows, 1):
        if len(row) != len(header):
            raise CaloraError(f"{file}, row {number}", f"{len(header)} fields", len(row), "correct the row")
    return header, rows


def of_export(folder: Path, adapter: str | None) -> tuple[str, Task, list[str]]:
    """An adapter of an exported folder, by name (None: the only one that chooses among answers), its task, and its identity.

    Raises:
        CaloraError: the folder is none, or has no such adapter.
    """
    catalogue = Catalogue.read(folder)
    model = _chosen(catalogue, adapter)
    files = [catalogue.base.name, *model.apply]
    return model.name, scored_task(model), [sha256(folder / name) for name in files]


def _chosen(catalogue: Catalogue, adapter: str | None) -> Model:
    fit = [name for name, model in catalogue.models.items() if model.task and model.task.scored]
    fix = "name one: --adapter NAME"
    if adapter is None and len(fit) != 1:
        raise CaloraError(catalogue.folder, "one adapter that chooses answers", ", ".join(fit) or "none", fix)
    try:
        model = catalogue[fit[0] if adapter is None else adapter]
    except NoSuchModel:
        known = ", ".join(name for name in catalogue.models if name != BASE_NAME)
        raise CaloraError("--adapter", f"one of {known}", adapter, fix) from None
    return model


def _rows(
    task: Task, file: Path, header: Sequence[str], table: Sequence[Sequence[str]], columns: Mapping[str, str]
) -> list[dict[str, str]]:
    """The rows as the task reads them, each looked at before any work."""
    if not task.scored or task.listed:
        expected, found = "a task whose answers fit into a table", "lists of answers" if task.listed else "written ones"
        raise CaloraError(f"task {task.name}", expected, found, "use `calora.load` or `calora serve`")
    needed = columns_of(task)
    if unknown := sorted(set(columns) - set(needed)):
        raise CaloraError("--column", f"columns of the prompt: {', '.join(needed)}", unknown[0], "correct it")
    place = {}
    for column in needed:
        name = columns.get(column, column)
        if name not in header:
            fix = f"name the one that has it: --column {column}=HEADER"
            raise CaloraError(file, f"a column '{name}'", ", ".join(header), fix)
        place[column] = header.index(name)
    rows = [{column: fields[index] for column, index in place.items()} for fields in table]
    for number, row in enumerate(rows, 1):
        try:
            task.render(row)
            task.choices(row)
        except CaloraError as error:
            raise CaloraError(f"{file}, row {number}", "a text in each column", error, "correct the row") from None
    return rows


def _done(partial: Path) -> list[dict[str, Any]]:
    """What an earlier call has done; a last line that was cut is done again."""
    if not partial.exists():
        return []
    text = partial.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        write_text(partial, whole)
    return [json.loads(line) for line in whole.splitlines()]


def _answer(model: Chooser, name: str, rows: Sequence[Row], done: list[dict[str, Any]], partial: Path) -> None:
    """Add to `done`, and to the file, what is missing."""
    with partial.open("a", encoding="utf-8") as stream:
        starts = range(len(done), len(rows), CHUNK)
        for first in progress(starts, name, f"x {CHUNK} rows", -(-len(rows) // CHUNK), len(done) // CHUNK):
            found = [
                {LABEL: choice.answer, PROBABILITY: round(max(choice.probabilities), 4)}
                for choice in model.choose(rows[first : first + CHUNK])
            ]
            stream.writelines(f"{json.dumps(one, ensure_ascii=False)}\n" for one in found)
            stream.flush()
            done += found


def _text(header: Sequence[str], table: Sequence[Sequence[str]], done: Sequence[Mapping[str, Any]]) -> str:
    """The CSV file that is written."""
    kept = [index for index, name in enumerate(header) if name not in (LABEL, PROBABILITY)]
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([*(header[index] for index in kept), LABEL, PROBABILITY])
    for fields, one in zip(table, done, strict=True):
        writer.writerow([*(fields[index] for index in kept), one[LABEL], one[PROBABILITY]])
    return stream.getvalue()
