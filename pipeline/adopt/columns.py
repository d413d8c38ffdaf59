"""What the columns of a data file are for: the text, the label or the answer, the values of a label."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any

from calora.errors import CaloraError
from pipeline.adopt.wanted import Entry
from stages.cells import text_of

LABELS = (  # what columns of a label or an answer are called, the likeliest first
    "label", "labels", "answer", "answers", "target", "class", "category", "sentiment", "gold", "y", "output", "response",
    "completion", "summary",
)  # fmt: skip
TEXTS = ("question", "query", "instruction", "prompt", "input", "text", "sentence", "review", "premise", "passage")
IDS = re.compile(r"(.*[_-])?(id|idx|index|uid|guid|uuid|key|url|timestamp|date)|unnamed: ?\d*", re.IGNORECASE)
MOST_LABELS = 26  # values of a column that is a choice
WORDS = 6  # that a column's name has at most
FILLED = 0.95  # of the rows have a text in a column that the prompt is to read
Rows = Sequence[Entry]


@dataclass(frozen=True)
class Choice:
    """A label's column: its values in order, how many rows have each; no values where it holds a free answer.

    The column is None where there are no labels.
    """

    column: str | None
    values: tuple[str | int | bool, ...]
    counts: dict[str, int]
    missing: int


def known(value: Any) -> str | None:
    """A cell's text; None where it is missing."""
    if isinstance(value, bool):
        return str(value).lower()
    value = text_of(value)
    return value.strip() if isinstance(value, str) and value.strip() else None


def label_column(rows: Rows, given: str | None, in_prompt: Sequence[str], taught: bool = False) -> str | None:
    """The label's column: the one that is given, else told by its name, else the only one with few values.

    Args:
        taught: whether there is an adapter to learn from: then there may be no label, which is None.

    Raises:
        CaloraError: there is none such, or no telling which.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if given is not None:
        if given not in columns:
            raise CaloraError("--label", f"a column among {', '.join(columns)}", repr(given), "correct it")
        return given
    free = [name for name in columns if name and name not in in_prompt]
    named = [name for wanted in LABELS for name in free if name.lower() == wanted]
    if named:
        return named[0]
    few = [name for name in free if not IDS.fullmatch(name) and is_choice(rows, name)]
    if len(few) == 1:
        return few[0]
    if taught and not few:
        return None
    found = f"columns {', '.join(columns)}"
    fix = "give --label" if few else "give --label; texts without labels need an adapter that teaches (--adapter)"
    raise CaloraError("--data", f"a column of labels or answers, called {', '.join(LABELS[:4])}, ...", found, fix)


def headless(rows: Rows) -> bool:
    """Whether the names of a table's columns look like its first row: one is a label of its column, or a sentence."""
    for name in rows[0] if rows else ():
        values = _counts([row.get(name) for row in rows])
        if len(name.split()) > WORDS or (
            len(values) <= MOST_LABELS and 2 * len(values) <= len(rows) and name in values
        ):
            return True
    return False


def is_choice(rows: Rows, column: str) -> bool:
    """Whether a column holds a few values again and again."""
    return _few(_counts([row.get(column) for row in rows]))


def _few(counts: Mapping[str, int]) -> bool:
    return 2 <= len(counts) <= MOST_LABELS and 2 * len(counts) <= sum(counts.values())


def _counts(cells: Sequence[Any]) -> dict[str, int]:
    """Value -> rows, as the reader takes them: 1 and 1.0 are one; -1 beside other numbers is none, as in GLUE's test sets."""
    values = [value for cell in cells if not isinstance(cell, list | dict) and (value := known(cell)) is not None]
    counts = Counter(map(_one_spelling, values))
    if len(counts) > 1 and all(re.fullmatch(r"-?\d+", value) for value in counts):
        counts.pop("-1", None)
    return dict(counts)


def _one_spelling(value: str) -> str:
    return value.lower() if value.lower() in ("true", "false") else re.sub(r"^(-?\d+)\.0+$", r"\1", value)


def choice(rows: Rows, column: str | None, names: Sequence[str] = ()) -> Choice:
    """What a label's column holds.

    Args:
        names: what the publisher calls the values 0, 1, ... (the hub's ClassLabel).
    """
    cells = [row.get(column) for row in rows] if column else []
    counts, nested = _counts(cells), any(isinstance(cell, list | dict) for cell in cells)
    few = not nested and (bool(names) or _few(counts))
    ordered = tuple(dict.fromkeys(map(typed, sorted(counts, key=_order)))) if few else ()
    ordered = tuple(range(len(names))) if names else ordered
    return Choice(column, ordered, counts, len(cells) - sum(counts.values()) if not nested else 0)


def _order(value: str) -> tuple[int, float, str]:
    number = re.fullmatch(r"-?\d+(\.\d+)?", value)
    return (0, float(value), "") if number else (1, 0.0, value)


def typed(value: str) -> str | int | bool:
    """A label as params.yaml writes it: the reader takes 1 and "1", true and "True" for one."""
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    return int(value) if re.fullmatch(r"-?(0|[1-9]\d*)", value) else value


def text_columns(rows: Rows, label: str | None, but: Sequence[str] = ()) -> list[str]:
    """The columns that hold what the model is to read, in the order of the file, but for some.

    Raises:
        CaloraError: there is none.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    others = [
        name
        for name in columns
        if name and name not in (label, *but) and not IDS.fullmatch(name) and name.lower() not in LABELS
    ]
    found = [name for name in others if _is_text(rows, name)]
    if not found:
        raise CaloraError(
            "--data", "a column of texts beside the label", f"columns {', '.join(columns)}", "give --prompt"
        )
    return found


def _is_text(rows: Rows, column: str) -> bool:
    """Texts in nearly all rows, more than one word in some: no numbers, no category, no hint that most rows lack."""
    if set(column) & set(".[]{}!:"):
        return False
    texts = [cell for row in rows if isinstance(cell := row.get(column), str) and cell.strip()]
    wordy = any(" " in text.strip() for text in texts) or column.lower() in TEXTS
    return wordy and len(texts) >= FILLED * len(rows)


def proposed_prompt(columns: Sequence[str], label: str | None, chosen: bool) -> str:
    """Each column on a line under its name, and where the answer is to come the label's name.

    Args:
        chosen: whether the answer is one of a few words that belong to the label's name; else it is an answer.
    """
    lines = [f"{_title(name)}: {{{name}}}" for name in columns]
    return "\n".join([*lines, f"{_title(label)}:" if label and chosen else "Answer:"])


def _title(name: str) -> str:
    words = re.sub(r"[_\s-]+", " ", name).strip()
    return words[:1].upper() + words[1:]


def columns_of(prompt: str) -> list[str]:
    """The columns that a prompt reads."""
    try:
        return list(dict.fromkeys(name for _, name, _, _ in Formatter().parse(prompt) if name))
    except ValueError:
        return []  # `Task` says what is wrong with it


def proposed_answers(values: Sequence[str | int | bool], names: Sequence[str]) -> list[str]:
    """The words of an answer: the publisher's names of the labels, else the labels themselves where those are words.

    Two that are none (false and true, 0 and 1) are no and yes, more of them letters.
    """
    if len(names) == len(values) and names:
        return [re.sub(r"[_-]+", " ", name) for name in names]
    if all(isinstance(value, str) for value in values):
        return [str(value) for value in values]
    return ["no", "yes"] if len(values) == 2 else list(string.ascii_uppercase[: len(values)])


def matched(values: Sequence[str | int | bool], answers: Sequence[str]) -> list[str | int | bool]:
    """The labels in the order of the answers: by their own words where those are the answers, else as they are."""
    by_word = {str(value).strip().lower(): value for value in values}
    words = [answer.strip().lower() for answer in answers]
    return [by_word[word] for word in words] if set(words) == set(by_word) else list(values)
