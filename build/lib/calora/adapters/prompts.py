"""A task that comes with an adapter, and may be a stranger's: its prompt is filled in and can do nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from string import Formatter
from typing import Any

from calora.errors import CaloraError
from calora.models.tasks import Task

KINDS = {
    "name": "a text", "prompt": "a text", "answers": "a list of texts", "max_tokens": "a whole number above 0",
    "likelihood": "a text", "metrics": "a list of texts",
}  # fmt: skip
LATER = {"likelihood", "metrics"}  # entries that tasks of before do not have


def task_of(where: object, value: Mapping[str, Any]) -> Task:
    """The task that `value` describes (as `Task.to_json` writes it).

    Raises:
        CaloraError: an entry is missing or of another kind, or the prompt holds more than plain columns.
    """
    names = {field.name for field in fields(Task)}
    if wrong := sorted((set(value) ^ names) - (LATER - set(value))):
        raise CaloraError(f"{where}: task", f"the entries {', '.join(sorted(names))}", f"not so: {wrong}", "correct it")
    for name, found in value.items():
        if not _fits(name, found):
            expected = KINDS.get(name, KINDS["max_tokens"])
            raise CaloraError(f"{where}: task.{name}", expected, f"{found!r:.80}", "correct it")
    check_prompt(f"{where}: task.prompt", value["prompt"])
    for answer in value["answers"]:
        check_prompt(f"{where}: task.answers", answer)
    return Task.from_json(value)


def _fits(name: str, value: object) -> bool:
    if name in ("name", "prompt", "likelihood"):
        return isinstance(value, str)
    if name in ("answers", "metrics"):
        return isinstance(value, list | tuple) and all(isinstance(answer, str) for answer in value)
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def check_prompt(where: object, prompt: str) -> None:
    """Raise `CaloraError` unless every field of the prompt is a plain `{column}`.

    str.format would also look up attributes and items of the values, convert them, and pad them to any width.
    """
    try:
        found = [part for part in Formatter().parse(prompt) if part[1] is not None]
    except ValueError as error:
        raise CaloraError(where, "columns in braces, {{ and }} for braces", error, "correct the prompt") from None
    for _, column, width, conversion in found:
        if not column or width or conversion or any(mark in column for mark in ".[]{}"):
            shown = str(column) + (f"!{conversion}" if conversion else "") + (f":{width}" if width else "")
            expected = "plain columns, such as {text}, and nothing else in braces"
            raise CaloraError(where, expected, f"{{{shown}}}"[:80], "name the column alone")
