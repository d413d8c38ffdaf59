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
from typing import TYPE_CHECKING, Any

from calora.errors import CaloraError

if TYPE_CHECKING:  # takes seconds to import, and downloads need no tokenizer
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

Row = Mapping[str, Any]
AFTER_PADDING = {  # these count positions from the padding token's number + 1 on, as RoBERTa does
    "camembert", "data2vec-text", "esm", "ibert", "lilt", "longformer", "luke", "markuplm", "mpnet", "roberta",
    "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
}  # fmt: skip


@dataclass(frozen=True)
class Task:
    """What an adapter is for.

    Args:
        name: its name, also the adapter's.
        prompt: a template with the row's columns in braces, such as `"Review: {text}\\nSentiment:"`; `{{` and `}}` are
            braces of the text. Nothing else of Python's format strings is allowed.
        answers: the candidate answers of a scored task, in label order; empty for a generated task.
        max_tokens: longest prompt in tokens, >= 1; of a longer one the end is kept, where the question stands, and the
            tokens that the tokenizer puts around a text.
        max_new_tokens: longest generated answer in tokens, >= 1.

    Raises:
        CaloraError: the prompt holds anything but columns, or a length is below 1.
    """

    name: str
    prompt: str
    answers: tuple[str, ...]
    max_tokens: int
    max_new_tokens: int

    def __post_init__(self) -> None:
        where = f"prompt of task {self.name}"
        try:
            fields = list(Formatter().parse(self.prompt))
        except ValueError as error:
            raise CaloraError(where, "columns in braces", error, "write {{ and }} for braces of the text") from None
        for _, name, form, conversion in fields:
            if name is not None and (not name or form or conversion or set(name) & set(".[]")):
                found = f"{{{name}{'!' if conversion else ''}{conversion or ''}{':' if form else ''}{form or ''}}}"
                raise CaloraError(where, "columns in braces, such as {text}", found, "name a column, and no more")
        if not self.columns:
            raise CaloraError(where, "columns in braces, such as {text}", "none", "name a column")
        for name, value in (("max_tokens", self.max_tokens), ("max_new_tokens", self.max_new_tokens)):
            if value < 1:
                raise CaloraError(f"{name} of task {self.name}", "1 or more", value, "correct it")

    @property
    def columns(self) -> list[str]:
        """The columns that the prompt reads, each once."""
        return list(dict.fromkeys(name for _, name, _, _ in Formatter().parse(self.prompt) if name))

    @property
    def scored(self) -> bool:
        """True if the answer is one of a fixed set."""
        return bool(self.answers)

    def to_json(self) -> dict[str, Any]:
        """As stored in calora.json and data/<task>/task.json."""
        return {**asdict(self), "answers": list(self.answers)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Task:
        """The inverse of `to_json`.

        Raises:
            CaloraError: a key is missing, unknown or of another kind.
        """
        kinds: dict[str, type] = {"name": str, "prompt": str, "answers": list, "max_tokens": int, "max_new_tokens": int}
        found = {key: type(value[key]) for key in value}
        if found != kinds or not all(isinstance(answer, str) for answer in value["answers"]):
            expected = ", ".join(f"{key} ({kind.__name__})" for key, kind in kinds.items())
            raise CaloraError("a stored task", expected, f"{dict(value)!r:.200}", "use a file that calora wrote")
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
        parts = Formatter().parse(self.prompt)
        return "".join(text + (row[column] if column else "") for text, column, _, _ in parts)

    def _prompt_ids(self, tokenizer: PreTrainedTokenizerBase, prompt: str, longest: int) -> list[int]:
        """[before, ..., end of the text, after]: what is cut is text, never a token that the tokenizer puts around it."""
        encoded = tokenizer(prompt, return_special_tokens_mask=True)
        ids: list[int] = encoded.input_ids
        special: list[int] = encoded.special_tokens_mask
        if len(ids) <= longest:
            return ids
        text = [place for place, added in enumerate(special) if not added]
        first, last = (text[0], text[-1] + 1) if text else (len(ids), len(ids))
        room = longest - first - (len(ids) - last)
        if room < 1:
            needed = f"at least {len(ids) - (last - first) + 1}: of a text its end, and what the tokenizer adds"
            raise CaloraError(
                f"longest prompt of task {self.name}", needed, longest, "raise max_tokens, or lower max_new_tokens"
            )
        return [*ids[:first], *ids[last - room : last], *ids[last:]]

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

    def encode(self, tokenizer: PreTrainedTokenizerBase, row: Row, limit: int | None = None) -> Example:
        """Tokenise a row. Without a label or an answer the example is unlabelled.

        Args:
            limit: most tokens that the model reads, prompt and generated answer together (see `positions`).
        """
        longest = self.max_tokens
        if limit is not None:
            longest = min(longest, limit if self.scored else limit - self.max_new_tokens)
        prompt_ids = self._prompt_ids(tokenizer, self.render(row), longest)
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


def encode_all(
    task: Task, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], limit: int | None = None
) -> list[Example]:
    """Tokenise many rows; `limit` as in `Task.encode`."""
    return [task.encode(tokenizer, row, limit) for row in rows]


def positions(config: PreTrainedConfig) -> int | None:
    """Most tokens that a model with this configuration has positions for; None where it names no such number (T5)."""
    text = config.get_text_config()
    found = getattr(text, "max_position_embeddings", None)
    if not isinstance(found, int) or found < 1:
        return None
    return found - text.pad_token_id - 1 if text.model_type in AFTER_PADDING else found


def read_rows(path: Path, made_by: str) -> list[dict[str, Any]]:
    """Read a split (JSON lines)."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        raise CaloraError(path, "a split of the task", "no such file", made_by) from None
    except ValueError as error:
        raise CaloraError(path, "one JSON object a line", error, f"delete it, then {made_by}") from None
    if not rows:
        raise CaloraError(path, "at least one row", "an empty split", "give the task more rows")
    return rows
