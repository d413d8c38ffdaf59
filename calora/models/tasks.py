"""A task: how a row becomes a prompt, what may be answered, and how an example becomes token ids.

Scored tasks choose among fixed answers by the logit of each answer's first token; generated tasks write
their answer freely. Both are trained on the tokens of the right answer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from string import Formatter
from typing import Any

from transformers import PreTrainedTokenizerBase

from calora.errors import CaloraError

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    """What an adapter is for.

    Args:
        name: its name, also the adapter's.
        prompt: a template with the row's columns in braces, such as `"Review: {text}\\nSentiment:"`.
        answers: the candidate answers of a scored task, in label order; empty for a generated task.
        max_tokens: longest prompt in tokens; of a longer one the end is kept, where the question stands.
        max_new_tokens: longest generated answer in tokens.
    """

    name: str
    prompt: str
    answers: tuple[str, ...]
    max_tokens: int
    max_new_tokens: int

    @property
    def columns(self) -> list[str]:
        """The columns that the prompt reads."""
        return [name for _, name, _, _ in Formatter().parse(self.prompt) if name]

    @property
    def scored(self) -> bool:
        """True if the answer is one of a fixed set."""
        return bool(self.answers)

    def to_json(self) -> dict[str, Any]:
        """As stored in calora.json and data/<task>/task.json."""
        return {**asdict(self), "answers": list(self.answers)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Task:
        """The inverse of `to_json`."""
        return cls(**{**value, "answers": tuple(value["answers"])})

    def render(self, row: Row) -> str:
        """The prompt of a row; raises `CaloraError` if a column is missing or empty."""
        for column in self.columns:
            text = row.get(column)
            if not isinstance(text, str) or not text.strip():
                found = "no such column" if column not in row else repr(text)
                raise CaloraError(
                    f"task {self.name}, row {dict(row)!r:.80}",
                    f"text in column '{column}'",
                    found,
                    "give the text, or change the task's prompt",
                )
        return self.prompt.format_map(dict(row))

    def answer_token_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """First token of each answer; they must differ, since they alone decide."""
        firsts = [self._ids(tokenizer, answer)[0] for answer in self.answers]
        if len(set(firsts)) < len(firsts):
            pairs = ", ".join(f"{a!r} -> {t}" for a, t in zip(self.answers, firsts, strict=True))
            raise CaloraError(
                f"answers of task {self.name}", "a different first token each", pairs, "choose other answer words"
            )
        return firsts

    @staticmethod
    def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        if not ids:
            raise CaloraError(f"answer {text!r}", "at least one token", "none", "choose another answer")
        return ids

    def encode(self, tokenizer: PreTrainedTokenizerBase, row: Row) -> Example:
        """Tokenise a row. Without a label or an answer the example is unlabelled."""
        prompt_ids = tokenizer(self.render(row)).input_ids[-self.max_tokens :]
        if self.scored:
            label = row.get("label")
            if label is None:
                return Example(prompt_ids)
            return Example(prompt_ids, self._ids(tokenizer, self.answers[label])[:1], label)
        references = row.get("answer")
        if references is None:
            return Example(prompt_ids)
        references = [references] if isinstance(references, str) else references
        ids = self._ids(tokenizer, references[0])[: self.max_new_tokens]
        if tokenizer.eos_token_id is not None:
            ids = [*ids, tokenizer.eos_token_id]
        return Example(prompt_ids, ids, references=tuple(references))


@dataclass(frozen=True)
class Example:
    """One tokenised row; `answer_ids` is empty and `label` is -1 where the answer is not known."""

    prompt_ids: list[int]
    answer_ids: list[int] = field(default_factory=list)
    label: int = -1
    references: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Real tokens that the model reads for this example."""
        return len(self.prompt_ids) + max(len(self.answer_ids) - 1, 0)


def encode_all(task: Task, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> list[Example]:
    """Tokenise many rows."""
    return [task.encode(tokenizer, row) for row in rows]


def read_rows(path: Path, made_by: str) -> list[dict[str, Any]]:
    """Read a split (JSON lines)."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        raise CaloraError(path, "a split of the task", "no such file", made_by) from None
    except ValueError as error:
        raise CaloraError(path, "one JSON object a line", error, f"delete it, then {made_by}") from None
    if not rows:
        raise CaloraError(path, "at least one row", "an empty split", "give the task more rows in params.yaml")
    return rows
