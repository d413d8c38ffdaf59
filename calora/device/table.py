"""`calora classify`: every row of a CSV file answered by an adapter, resumed where it was stopped."""

from __future__ import annotations

import asyncio
import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from calora.common.files import sha256, write_text
from calora.common.progress import progress
from calora.device.catalogue import BASE_NAME, Catalogue, Model, NoSuchModel
from calora.device.choose import choose, columns_of, scored_task
from calora.device.engine import Engine, LlamaEngine
from calora.device.limits import Limits
from calora.errors import CaloraError

LABEL, PROBABILITY = "label", "probability"  # columns that are added, or replaced
Start = Callable[[Catalogue, int, int], Engine]  # of (catalogue, context, slots)


def classify_table(
    folder: Path,
    adapter: str | None,
    file: Path,
    out: Path,
    columns: Mapping[str, str],
    threads: int | None = None,
    start: Start | None = None,
) -> dict[str, int]:
    """Write a CSV file with the rows of another one, the answer to each, and its probability.

    What is done is kept in a hidden file beside `out` until all is; the same call goes on from there.

    Args:
        folder: what `calora export` wrote.
        adapter: its name; None: the only one that chooses among answers.
        file: CSV in UTF-8, with a header.
        out: the file to write.
        columns: column of the prompt -> its header in the file, where that is another one.
        threads: of llama.cpp.
        start: makes the runtime.

    Returns:
        How often each answer was given.

    Raises:
        CaloraError: the folder, the adapter, or a row is not what it should be.
    """
    catalogue = Catalogue.read(folder)
    model = _chosen(catalogue, adapter)
    header, table = read_table(file)
    rows = _rows(model, file, header, table, columns)
    if out.exists() and out.samefile(file):
        raise CaloraError(out, "another file than the one that is read", "the same", "name another --out")
    if not out.parent.is_dir():
        raise CaloraError(out, "a folder that exists", "none", "make it, or name another --out")
    same = [sha256(file), *(sha256(catalogue.folder / name) for name in [catalogue.base.name, *model.apply]), columns]
    mark = hashlib.sha256(json.dumps([*same, model.name], sort_keys=True).encode()).hexdigest()[:12]
    partial = out.with_name(f".{out.name}.{mark}.partial")  # another input, adapter or export has another one
    done = _done(partial)
    if len(done) < len(rows):
        limits = Limits()
        context = min(limits.context, catalogue.context)
        engine = (
            start(catalogue, context, limits.slots)
            if start
            else LlamaEngine(catalogue.base, catalogue.loras, context, limits.slots, threads)
        )
        asyncio.run(_answer(engine, model, rows, done, partial, context, limits.slots))
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
    scored_task(model)
    return model


def _rows(
    model: Model, file: Path, header: Sequence[str], table: Sequence[Sequence[str]], columns: Mapping[str, str]
) -> list[dict[str, str]]:
    """The rows as the task reads them, each looked at before any work."""
    task = scored_task(model)
    if task.listed:
        expected = "a task whose answers fit into a table"
        raise CaloraError(f"model {model.name}", expected, "lists of answers", "use `calora serve`")
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


async def _answer(
    engine: Engine,
    model: Model,
    rows: Sequence[Mapping[str, str]],
    done: list[dict[str, Any]],
    partial: Path,
    context: int,
    slots: int,
) -> None:
    """Add to `done`, and to the file, what is missing."""
    try:
        with partial.open("a", encoding="utf-8") as stream:
            starts = range(len(done), len(rows), slots)
            for first in progress(starts, model.name, f"x {slots} rows", -(-len(rows) // slots), len(done) // slots):
                some = [choose(engine, model, row, context) for row in rows[first : first + slots]]
                found = [
                    {LABEL: choice.answer, PROBABILITY: round(max(choice.probabilities), 4)}
                    for choice in await asyncio.gather(*some)
                ]
                stream.writelines(f"{json.dumps(one, ensure_ascii=False)}\n" for one in found)
                stream.flush()
                done += found
    finally:
        await engine.close()


def _text(header: Sequence[str], table: Sequence[Sequence[str]], done: Sequence[Mapping[str, Any]]) -> str:
    """The CSV file that is written."""
    kept = [index for index, name in enumerate(header) if name not in (LABEL, PROBABILITY)]
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([*(header[index] for index in kept), LABEL, PROBABILITY])
    for fields, one in zip(table, done, strict=True):
        writer.writerow([*(fields[index] for index in kept), one[LABEL], one[PROBABILITY]])
    return stream.getvalue()
