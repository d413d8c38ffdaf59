"""Answers that a row brings: choices in columns of their own, or in one that lists them; and what the label says of them."""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.adopt.columns import FILLED, Rows, known, typed
from stages.cells import choices_of

# What columns of choices are called before their number or letter: choice1, option_a, ending0, or A, B, C, D alone
STEMS = ("", "choice", "option", "opt", "op", "answer", "ans", "ending", "solution", "sol", "candidate", "alternative")
PLACED = re.compile(r"(.*?)[\s_-]*(\d+|[A-Za-z])")
MISSING = "-1"  # a label that is none, as in GLUE's test sets


@dataclass(frozen=True)
class Options:
    """A row's own answers: their columns, templates, and the labels in their order.

    No labels: the label is the right answer's text, or what the list calls it.
    """

    columns: tuple[str, ...]
    answers: tuple[str, ...]
    labels: tuple[str | int | bool, ...]


def options(rows: Rows, label: str) -> Options | None:
    """The choices of the rows, if the label says which of them is right; None where there are no such."""
    names = list(dict.fromkeys(name for row in rows for name in row if name != label))
    found = (listed(rows, label, name) for name in names)
    placed = (in_columns(rows, label, columns) for columns in _groups(names))
    return next((one for one in (*found, *placed) if one is not None), None)


def in_columns(rows: Rows, label: str, columns: Sequence[str]) -> Options | None:
    """Choices in these columns, one each."""
    pairs = [(row, value) for row in rows if (value := known(row.get(label))) is not None and value != MISSING]
    filled = [all(known(row.get(name)) for name in columns) for row in rows]
    if not pairs or sum(filled) < FILLED * len(filled):
        return None
    places = [match[2] if (match := PLACED.fullmatch(name)) else name for name in columns]
    labels = _spelled({value for _, value in pairs}, len(columns), columns, places)
    if labels and len(columns) == 2 and all(len(name) == 1 for name in columns) and labels[0] in (0, 1):
        return None  # columns a and b with a label of 0 or 1 are a pair that is judged
    if labels is None and not all(value in {known(row.get(name)) for name in columns} for row, value in pairs):
        return None
    return Options(tuple(columns), tuple(f"{{{name}}}" for name in columns), labels or ())


def listed(rows: Rows, label: str, column: str) -> Options | None:
    """Choices in one column, a list of texts in each row."""
    every = [choices_of(row.get(column)) for row in rows]
    pairs = [
        (*found, value) for found, row in zip(every, rows, strict=True)
        if found and (value := known(row.get(label))) is not None and value != MISSING
    ]  # fmt: skip
    if not pairs or None in every:
        return None
    answers = (f"{{{column}}}",)
    if all(value in names or value in [text.strip() for text in texts] for texts, names, value in pairs):
        return Options((column,), answers, ())
    most = max(len(texts) for texts, _, _ in pairs)
    labels = _spelled({value for _, _, value in pairs}, most, (), ())
    return Options((column,), answers, labels) if labels else None


def _groups(names: Sequence[str]) -> Iterator[list[str]]:
    """Columns of one name and the numbers or letters from the first on."""
    stems: dict[tuple[str, bool], dict[int, str]] = {}
    for name in names:
        match = PLACED.fullmatch(name)
        if match and match[1].lower() in STEMS:
            number = match[2].isdigit()
            place = int(match[2]) if number else string.ascii_lowercase.index(match[2].lower())
            stems.setdefault((match[1].lower(), number), {})[place] = name
    for (_, number), places in stems.items():
        first = min(places)
        if len(places) > 1 and sorted(places) == list(range(first, first + len(places))) and first <= int(number):
            yield [places[place] for place in sorted(places)]


def _spelled(
    values: set[str], count: int, columns: Sequence[str], places: Sequence[str]
) -> tuple[str | int | bool, ...] | None:
    """The labels of `count` choices, as the values spell them: names of columns, their ends, numbers or letters."""
    letters = string.ascii_uppercase[:count]
    spellings = [
        columns, places, [place.upper() for place in places], [place.lower() for place in places],
        [str(n) for n in range(count)], [str(n + 1) for n in range(count)], list(letters), list(letters.lower()),
    ]  # fmt: skip
    fit = next((spelling for spelling in spellings if values <= set(spelling)), None)
    return tuple(map(typed, fit)) if fit else None
