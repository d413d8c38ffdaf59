"""What a model answers to a row, whichever runtime computes it. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from calora.errors import CaloraError
from calora.models.tasks import Row, Task


@dataclass(frozen=True)
class Choice:
    """One of a row's answers.

    Args:
        answer: the most probable one.
        probabilities: of each answer of the row, among these; their sum is 1.
        answers: of the row, in label order.
        tokens: of the prompt.
    """

    answer: str
    probabilities: list[float]
    answers: list[str]
    tokens: int

    @classmethod
    def of(cls, texts: Sequence[str], probabilities: Sequence[float], tokens: int) -> Choice:
        """The first of the most probable among the texts of the answers."""
        answers = [text.strip() for text in texts]
        best = max(range(len(answers)), key=probabilities.__getitem__)
        return cls(answers[best], list(probabilities), answers, tokens)

    @property
    def label(self) -> int:
        """The place of the answer."""
        return max(range(len(self.answers)), key=self.probabilities.__getitem__)


def rows_of(task: Task, texts: Sequence[str | Mapping[str, Any]]) -> list[Row]:
    """Rows of a task: a text stands for the first column of the prompt."""
    return [{task.columns[0]: text} if isinstance(text, str) else text for text in texts]


def columns_of(task: Task) -> list[str]:
    """The columns of a row: those of the prompt, and of the answers."""
    return list(dict.fromkeys([*task.columns, *task.answer_columns]))


def as_row(task: Task, given: str | Row) -> Row:
    """A text stands for a row whose prompt has one column; raises `CaloraError` where there are more."""
    if not isinstance(given, str):
        return given
    columns = columns_of(task)
    if len(columns) > 1:
        raise CaloraError(f"input of task {task.name}", f"objects with {', '.join(columns)}", "a text", "send objects")
    return {columns[0]: given}
