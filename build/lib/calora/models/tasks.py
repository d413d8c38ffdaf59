"""A task: how a row becomes a prompt, what may be answered, and how an example becomes token ids.

Scored tasks choose among answers, the same for every row or the row's own, by the likelihood of each; generated tasks
write theirs freely. Both are trained on the tokens of the right answer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Any, Literal, get_args

from calora.errors import CaloraError

if TYPE_CHECKING:  # takes seconds to import, and downloads need no tokenizer
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

Row = Mapping[str, Any]
Likelihood = Literal["sum", "mean"]
# What is measured of each kind of answer; `calora.evaluation.metrics` has the definitions.
WRITTEN = ("em", "f1")
CHOSEN = ("accuracy", "f1", "macro_f1", "matthews")
AGREEMENT = "agreement"  # with answers that are not known to be right: the teacher's
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
        answers: the candidate answers of a scored task, in label order; empty for a generated task. They are templates
            too: `(" {choice1}", " {choice2}")` are a row's own, and a single one, `(" {endings}",)`, stands for as many
            as its column has texts.
        max_tokens: longest prompt in tokens, >= 1; of a longer one the end is kept, where the question stands, and the
            tokens that the tokenizer puts around a text.
        max_new_tokens: longest generated answer in tokens, >= 1.
        likelihood: of an answer of several tokens: the `sum` of their log-probabilities, or their `mean`
            (length-normalised).
        metrics: what is measured; the first one counts. Of fixed answers: `accuracy`, `f1` (of two answers: the
            second is the positive one), `macro_f1`, `matthews`; of a row's own: `accuracy`; of generated ones: `em`
            and `f1`, as SQuAD has them; of any where the right ones are not known: `agreement`, the share that is as
            somebody else answered. None: `accuracy`; `em` and `f1`.

    Raises:
        CaloraError: the prompt or an answer holds anything but columns, a length is below 1, or a metric is none of
            such answers.
    """

    name: str
    prompt: str
    answers: tuple[str, ...]
    max_tokens: int
    max_new_tokens: int
    likelihood: Likelihood = "sum"
    metrics: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_template(f"prompt of task {self.name}", self.prompt)
        for answer in self.answers:
            _check_template(f"answers of task {self.name}", answer)
        if not self.columns:
            raise CaloraError(
                f"prompt of task {self.name}", "columns in braces, such as {text}", "none", "name a column"
            )
        if len(self.answers) == 1 and len(self.answer_columns) != 1:
            expected = "two answers or more, or one whose column holds a list of them, or none (a generated answer)"
            raise CaloraError(f"answers of task {self.name}", expected, list(self.answers), "correct them")
        for name, value in (("max_tokens", self.max_tokens), ("max_new_tokens", self.max_new_tokens)):
            if value < 1:
                raise CaloraError(f"{name} of task {self.name}", "1 or more", value, "correct it")
        if self.likelihood not in get_args(Likelihood):
            raise CaloraError(f"likelihood of task {self.name}", "sum or mean", self.likelihood, "correct it")
        object.__setattr__(self, "metrics", self.metrics or (("accuracy",) if self.scored else WRITTEN))
        known = self._measurable()
        wrong = [name for name in self.metrics if name not in known]
        if wrong or len(set(self.metrics)) < len(self.metrics):
            expected = f"some of {', '.join(known)}, each once"
            raise CaloraError(f"metrics of task {self.name}", expected, ", ".join(self.metrics), "correct them")

    def _measurable(self) -> tuple[str, ...]:
        if not self.scored:
            return (*WRITTEN, AGREEMENT)
        if not self.fixed:
            return ("accuracy", AGREEMENT)
        chosen = CHOSEN if len(self.answers) == 2 else tuple(name for name in CHOSEN if name != "f1")
        return (*chosen, AGREEMENT)

    @property
    def columns(self) -> list[str]:
        """The columns that the prompt reads, each once."""
        return _columns(self.prompt)

    @property
    def answer_columns(self) -> list[str]:
        """The columns that the answers read, each once; none where every row has the same answers."""
        return list(dict.fromkeys(name for answer in self.answers for name in _columns(answer)))

    @property
    def scored(self) -> bool:
        """True if the answer is one of those that a row or the task gives."""
        return bool(self.answers)

    @property
    def fixed(self) -> bool:
        """True if the answers are the same for every row."""
        return self.scored and not self.answer_columns

    @property
    def listed(self) -> bool:
        """True if a row's answers are the texts of one column, as many as it has."""
        return len(self.answers) == 1

    def to_json(self) -> dict[str, Any]:
        """As stored in calora.json and data/<task>/task.json."""
        return {**asdict(self), "answers": list(self.answers), "metrics": list(self.metrics)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Task:
        """The inverse of `to_json`.

        Raises:
            CaloraError: a key is missing, unknown or of another kind.
        """
        kinds: dict[str, type] = {
            "name": str, "prompt": str, "answers": list, "max_tokens": int, "max_new_tokens": int, "likelihood": str, "metrics": list,
        }  # fmt: skip
        value = {"likelihood": "sum", "metrics": [], **value}  # tasks of before have neither
        found = {key: type(value[key]) for key in value}
        if found != kinds or not all(isinstance(text, str) for text in [*value["answers"], *value["metrics"]]):
            expected = ", ".join(f"{key} ({kind.__name__})" for key, kind in kinds.items())
            raise CaloraError("a stored task", expected, f"{dict(value)!r:.200}", "use a file that calora wrote")
        return cls(**{**value, "answers": tuple(value["answers"]), "metrics": tuple(value["metrics"])})

    def render(self, row: Row) -> str:
        """The prompt of a row; raises `CaloraError` if a column is missing or empty."""
        return self._filled(self.prompt, row)

    def choices(self, row: Row) -> tuple[str, ...]:
        """The answers among which a scored task chooses for a row.

        Raises:
            CaloraError: a column is missing or empty, or holds fewer than two texts where it should list them.
        """
        if not self.listed:
            return tuple(self._filled(answer, row) for answer in self.answers)
        (column,) = self.answer_columns
        texts = row.get(column)
        if not isinstance(texts, list | tuple) or len(texts) < 2:
            found = "no such column" if column not in row else repr(texts)
            where = f"task {self.name}, row {dict(row)!r:.80}"
            raise CaloraError(
                where, f"two texts or more in column '{column}'", found, "give them, or leave out the row"
            )
        return tuple(self._filled(self.answers[0], {column: text}) for text in texts)

    def _filled(self, template: str, row: Row) -> str:
        for column in _columns(template):
            text = row.get(column)
            if not isinstance(text, str) or not text.strip():
                found = "no such column" if column not in row else repr(text)
                raise CaloraError(
                    f"task {self.name}, row {dict(row)!r:.80}",
                    f"text in column '{column}'",
                    found,
                    "give the text, or change the task's prompt",
                )
        parts = Formatter().parse(template)
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

    def answer_token_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
        """The token of each answer where every row has the same ones, each of a single token; else None.

        Their logits at the prompt's last position then decide: one pass for all answers instead of one for each.

        Raises:
            CaloraError: two fixed answers are the same tokens, or one begins with another, which would always win.
        """
        if not self.fixed:
            return None
        ids = [self._ids(tokenizer, answer) for answer in self.choices({})]
        for i, one in enumerate(ids):
            for j, other in enumerate(ids):
                begins = self.likelihood == "sum" and other[: len(one)] == one
                if i != j and (one == other or begins):
                    pair = f"{self.answers[i]!r} -> {one}, {self.answers[j]!r} -> {other}"
                    expected = "answers none of which begins with another, in tokens"
                    fix = "choose other answer words, or `likelihood: mean`"
                    raise CaloraError(f"answers of task {self.name}", expected, pair, fix)
        return [one[0] for one in ids] if self._single(ids) else None

    def _single(self, ids: Sequence[Sequence[int]]) -> bool:
        return self.fixed and all(len(one) == 1 for one in ids)

    @staticmethod
    def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        if not ids:
            raise CaloraError(f"answer {text!r}", "at least one token", "none", "choose another answer")
        return ids

    def _written_ids(self, tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
        """A written answer follows a space, as words of a text do: "Answer: Denver", the tokens that the text before has of it."""
        before = self._ids(tokenizer, ":")
        both = self._ids(tokenizer, f": {text}")
        return (
            both[len(before) :]
            if both[: len(before)] == before and len(both) > len(before)
            else self._ids(tokenizer, text)
        )

    def encode(self, tokenizer: PreTrainedTokenizerBase, row: Row, limit: int | None = None) -> Example:
        """Tokenise a row. Without a label or an answer the example is unlabelled.

        Args:
            limit: most tokens that the model reads, prompt and generated answer together (see `positions`).
        """
        texts = self.choices(row) if self.scored else ()
        ids = tuple(self._ids(tokenizer, text) for text in texts)
        longest = self.max_tokens
        if limit is not None:  # the last token of an answer is never read
            behind = max((len(one) - 1 for one in ids), default=0) if self.scored else self.max_new_tokens
            longest = min(longest, limit - behind)
        whole = () if self._single(ids) else ids
        example = Example(self._prompt_ids(tokenizer, self.render(row), longest), choices=texts, choice_ids=whole)
        if self.scored:
            label = row.get("label")
            if label is None:
                return example
            return replace(example, answer_ids=ids[label], label=label)
        references = row.get("answer")
        if references is None:
            return example
        references = [references] if isinstance(references, str) else references
        written = self._written_ids(tokenizer, references[0])[: self.max_new_tokens]
        if tokenizer.eos_token_id is not None:
            written = [*written, tokenizer.eos_token_id]
        return replace(example, answer_ids=written, references=tuple(references))


def _columns(template: str) -> list[str]:
    return list(dict.fromkeys(name for _, name, _, _ in Formatter().parse(template) if name))


def _check_template(where: str, template: str) -> None:
    """Raise `CaloraError` where braces hold anything but the name of a column."""
    try:
        fields = list(Formatter().parse(template))
    except ValueError as error:
        raise CaloraError(where, "columns in braces", error, "write {{ and }} for braces of the text") from None
    for _, name, form, conversion in fields:
        if name is not None and (not name or form or conversion or set(name) & set(".[]")):
            found = f"{{{name}{'!' if conversion else ''}{conversion or ''}{':' if form else ''}{form or ''}}}"
            raise CaloraError(where, "columns in braces, such as {text}", found, "name a column, and no more")


@dataclass(frozen=True)
class Example:
    """One tokenised row; `answer_ids` is empty and `label` is -1 where the answer is not known.

    `choices` are the answers of a scored task, `choice_ids` their tokens where each is scored as a whole.
    """

    prompt_ids: list[int]
    answer_ids: list[int] = field(default_factory=list)
    label: int = -1
    references: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    choice_ids: tuple[list[int], ...] = ()

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
