"""Bring a base, a LoRA and data of one's own: look at them, put them into own/, and write params.yaml."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from calora.errors import CaloraError
from pipeline.adopt import adapter, base, data
from pipeline.adopt.base import Base
from pipeline.adopt.entries import Document, first_that_fits, learns_from_labels, retarget, without_labels
from pipeline.adopt.files import Source, gather
from pipeline.adopt.lengths import Lengths
from pipeline.adopt.outlook import Row, Texts, outlook, texts_of
from pipeline.adopt.own import Own
from pipeline.adopt.show import WIDTH, show_changes, show_found, show_outlook
from pipeline.adopt.wanted import Said, Wanted
from stages.tasks import filled

__all__ = ["Wanted", "adopt"]
ABOUT = "Bytes from shapes; memory of the largest stage and minutes on {cores} cores, from {compute:.0f} GFLOP/s a core in {dtype}, to a factor of two."


def adopt(root: Path, wanted: Wanted, dry: bool = False) -> None:
    """Write what `wanted` names into params.yaml of `root`, and tell what was found.

    Raises:
        CaloraError: something of it cannot be used; then nothing is written.
    """
    with contextlib.chdir(root), Own(wanted.copy) as own:
        document, said = Document(), Said()
        wanted = again(wanted, document.values["data"]["sets"])
        if not (wanted.base or wanted.adapter or wanted.data):
            raise CaloraError("adopt", "--base, --adapter or --data", "none of them", "python -m pipeline adopt --help")
        theirs = base.look(wanted.base, said) if wanted.base else base.present(document.values["base"])
        source = gather(wanted) if wanted.data else None
        name = named(wanted, source, document.values)
        lengths = enter(document, wanted, source, name, theirs, own, said)
        rows = data.pools(document.check(), name) if source else {}
        if rows:
            counts = ", ".join(f"{count} {split}" for split, count in rows.items())
            said.add("run", f"{counts} texts (at most data.sizes)")
        outlooks, about = estimates(document, theirs, texts_of(document.values, rows, lengths), name, said)
        document.check()
        if not dry:
            document.save()
            own.keep()
        tell(said, document, own, dry, outlooks, about)


def enter(
    document: Document, wanted: Wanted, source: Source | None, name: str, theirs: Base | None, own: Own, said: Said
) -> Lengths | None:
    """Set the entries of what is given, and what they ask for elsewhere; the lengths of the data's texts."""
    outline, lengths = theirs.outline if theirs else None, None
    if source is not None:
        before = document.values["data"]["sets"].get(name)
        taught = bool(wanted.adapter) or name in document.values["teacher"]["adapters"]
        entry, lengths = data.look(source, wanted, name, before, outline, own, said, taught)
        document.set(f"data.sets.{name}", entry)
        if taught and not learns_from_labels(entry):
            without_labels(document)
    if wanted.adapter:
        document.set(f"teacher.adapters.{name}", adapter.look(wanted.adapter, name, outline, own, said))
    if wanted.data or wanted.adapter:
        document.set("tasks", tasks(document.values["tasks"], name))
    if wanted.base and theirs is not None:
        document.set("base", theirs.entry)
        retarget(document, theirs.outline)
    return lengths


def again(wanted: Wanted, sets: Mapping[str, Any]) -> Wanted:
    """The data of a task that is named and known, where its prompt, answers or label are to be others."""
    entry = filled(sets.get(wanted.name or "", {}))
    if wanted.data or not (wanted.prompt or wanted.answers or wanted.label or wanted.chat):
        return wanted
    if entry.get("source") == "files":
        train = entry["train"] if isinstance(entry["train"], str) else entry["train"][0]
        return replace(wanted, data=(train,), columns=wanted.columns or tuple(entry.get("header") or ()))
    if entry.get("source") == "hub":
        return replace(wanted, data=(f"{entry['repo']}@{entry['revision']}",), subset=entry["subset"])
    fix = "give --data, or the --name of a task that was adopted"
    raise CaloraError("adopt", "the data that the prompt and the answers are for", repr(wanted.name), fix)


def named(wanted: Wanted, source: Source | None, params: Mapping[str, Any]) -> str:
    """The task's name: given, or after the data; an adapter alone belongs to the run's only task."""
    if wanted.name is not None and not re.fullmatch("[A-Za-z0-9_-]+", wanted.name):
        raise CaloraError("--name", "letters, digits, _ and - alone", repr(wanted.name), "choose another name")
    if source is not None:
        return wanted.name or source.name
    known, tasks = list(params["data"]["sets"]), list(params["tasks"])
    name = wanted.name or (tasks[0] if len(tasks) == 1 else None)
    if wanted.adapter and name not in known:
        expected = f"--data, or the --name of a task among {', '.join(known)}"
        raise CaloraError("--adapter", expected, repr(wanted.name), "say what the adapter is for")
    return name or tasks[0]


def tasks(before: list[str], name: str) -> list[str]:
    """The tasks of the run: this one, beside the others where it was among them."""
    return list(before) if name in before else [name]


def estimates(document: Document, theirs: Base | None, texts: Texts, name: str, said: Said) -> tuple[list[Row], str]:
    """A row for each recipe, and how exact they are; a recipe of the run that does not fit gives way to one that does."""
    if theirs is None:
        said.unsure.append("bytes and minutes: the base is not on this machine yet (`dvc repro base` fetches it)")
        return [], ""
    brought = name in document.values["teacher"]["adapters"]
    rows, speed = outlook(document.values, theirs.outline, texts, brought)
    if all(row.refused for row in rows):
        raise CaloraError("--base", "a base that some recipe fits", rows[0].refused, "name another base")
    document.set("recipes", first_that_fits(document, {row.name: not row.refused for row in rows}))
    return rows, ABOUT.format(cores=speed.cores, compute=speed.compute, dtype=speed.dtype)


def tell(said: Said, document: Document, own: Own, dry: bool, rows: list[Row], about: str) -> None:
    """All that the user sees."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDTH)
    show_found(console, said)
    show_changes(console, document.diff, dry, own.placed)
    if rows:
        show_outlook(console, rows, document.values["recipes"], about)
    console.print()
    console.print(
        "nothing was written (--dry-run)"
        if dry
        else "run it: [bold]make run[/]   (a few hundred texts first: make smoke)"
    )
