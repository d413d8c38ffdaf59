"""Look at data: which split is which, the label, the prompt, the answers and the lengths; the entry of data.sets."""

from __future__ import annotations

import random
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calora.errors import CaloraError
from calora.models.tasks import Task
from pipeline.adopt.columns import (
    LABELS,
    Choice,
    choice,
    columns_of,
    known,
    label_column,
    matched,
    proposed_answers,
    proposed_prompt,
    text_columns,
)
from pipeline.adopt.files import Source
from pipeline.adopt.own import Own
from pipeline.adopt.wanted import Entry, Said, Wanted, shown
from stages.cells import answer_of
from stages.config import Params
from stages.corpora import SPLITS, split_pools, task_of
from stages.files import read_file

if TYPE_CHECKING:
    from calora.preview.outline import Outline

SAMPLE = 2000  # rows whose tokens are counted
LETTERS = string.ascii_uppercase  # they stand for labels that are no words
A_TOKEN = 3.0  # letters that it has at least, about, where the tokenizer is not at hand
STEP = 16  # max_tokens is a multiple of it
LONGEST = 4096  # that is proposed


@dataclass(frozen=True)
class Lengths:
    """Tokens of prompts and answers.

    Args:
        mean, most, longest: of prompts; `most` holds 99 in 100.
        answer: what holds 99 in 100 answers.
        written: the same where answers are written freely, else 0.
        counted: by the base's tokenizer, not guessed from letters.
    """

    mean: float
    most: int
    longest: int
    answer: int
    written: int
    counted: bool


def look(
    source: Source,
    wanted: Wanted,
    name: str,
    before: Mapping[str, Any] | None,
    base: Outline | None,
    own: Own,
    said: Said,
) -> tuple[Entry, Lengths]:
    """The entry of a task, and the lengths of its texts.

    What the command line does not say stays as the entry of `before` has it, as long as that fits the data.

    Raises:
        CaloraError: a column, a label or an answer does not fit.
    """
    before = before if before and before.get("source") == source.entry["source"] else {}
    train = source.rows["train"]
    if not train:
        raise CaloraError("--data", "rows for training", "none", "name a file that has rows")
    _keep_splits(source, before, name)
    column = label_column(train, wanted.label or _kept_label(before, train), columns_of(wanted.prompt or ""))
    splits, label = _tested(source, column, said)
    found = choice(
        [row for place in splits.values() for row in _renamed(source.rows[place], label[place], column)],
        column,
        source.label_names.get(column, ()),
    )
    prompt = _prompt(name, wanted, before, train, found.column, base, said)
    answers, labels = _answers(name, wanted, before, found, source.label_names.get(column, ()), prompt, base, said)
    rows = [row for place in splits.values() for row in source.rows[place]]
    lengths = measure(prompt, answers, rows, label, base, column)
    entry: Entry = {
        **source.entry,
        **{split: source.placed(splits[split], name, own) if split in splits else None for split in ("train", "validation", "test")},
        "label": column if len(set(label.values())) == 1 else {split: label[place] for split, place in splits.items()},
        "labels": labels, "prompt": prompt, "answers": answers,
        "max_tokens": _longest(lengths, before, base, said),
        "max_new_tokens": before.get("max_new_tokens", 4) if answers else max(lengths.answer, before.get("max_new_tokens", 0)),
    }  # fmt: skip
    describe(source, splits, found, entry, lengths, said)
    return entry, lengths


def _keep_splits(source: Source, before: Mapping[str, Any], name: str) -> None:
    """The validation and test files of an earlier run, where the training file is the same and no other is named."""
    train = source.places["train"]
    if not isinstance(train, Path) or before.get("train") not in (f"own/{name}/{train.name}", shown(train)):
        return
    for split in ("validation", "test"):
        kept = before.get(split)
        if split not in source.rows and kept and Path(kept).exists():
            source.places[split], source.rows[split] = Path(kept), read_file(Path(kept))


def _kept_label(before: Mapping[str, Any], rows: Sequence[Entry]) -> str | None:
    label = before.get("label")
    label = label.get("train") if isinstance(label, Mapping) else label
    return str(label) if label and any(label in row for row in rows[:100]) else None


def _renamed(rows: Sequence[Entry], theirs: str, ours: str) -> list[Entry]:
    return list(rows) if theirs == ours else [{**row, ours: row.get(theirs)} for row in rows]


def _tested(source: Source, column: str, said: Said) -> tuple[dict[str, str], dict[str, str]]:
    """Split of the task -> split of the source, and split of the source -> its label's column.

    A test set without labels, as GLUE's are, leaves its place to the validation set.
    """
    label = {split: _label_in(rows, column) for split, rows in source.rows.items()}
    labelled = [split for split, rows in source.rows.items() if any(_is_label(row.get(label[split])) for row in rows)]
    if "train" not in labelled:
        raise CaloraError("--data", f"labels in column '{column}'", "none", "give --label")
    splits = {split: split for split in SPLITS if split in labelled}
    if "test" in splits:
        return splits, label
    missing = "the test set has no labels" if "test" in source.rows else "there is no test set"
    if "validation" in splits:
        splits["test"] = splits.pop("validation")
        said.unsure.append(f"{missing}: the validation set is the test set, and validation is split off train")
    else:
        said.unsure.append(f"{missing}: it is split off train, as is validation (shares: data.split)")
    return splits, label


def _label_in(rows: Sequence[Entry], column: str) -> str:
    """The label's column in a file that may call it otherwise."""
    columns = {name for row in rows for name in row}
    return next((name for name in (column, *LABELS) if name in columns), column)


def _is_label(value: Any) -> bool:
    return bool(value) if isinstance(value, list | dict) else known(value) not in (None, "-1")


def _prompt(
    name: str,
    wanted: Wanted,
    before: Mapping[str, Any],
    rows: Sequence[Entry],
    label: str,
    base: Outline | None,
    said: Said,
) -> str:
    """The prompt: given, or as it was, or proposed; in the base's chat template if that is asked for."""
    columns = {name for row in rows for name in row}
    kept = str(before.get("prompt") or "")
    if wanted.prompt is not None:
        prompt = wanted.prompt.replace("\\n", "\n")
    elif kept and set(columns_of(kept)) <= columns:
        prompt = kept
    else:
        prompt = proposed_prompt(text_columns(rows, label), label)
        said.unsure.append(
            "the prompt, proposed from the columns: a LoRA needs the one that it was trained with (--prompt)"
        )
    _task(name, prompt)  # raises where it is no prompt
    for column in columns_of(prompt):
        if column not in columns:
            raise CaloraError("--prompt", f"columns among {', '.join(sorted(columns))}", f"{{{column}}}", "correct it")
    if wanted.chat and (base is None or not base.chat):
        found = "a base without one" if base else "no base on this machine yet"
        raise CaloraError("--chat", "a base with a chat template", found, "leave it out, or give --base")
    if base is None or not base.chat or in_template(base.tokenizer, "", "") in prompt:
        return prompt
    if wanted.chat:
        return in_template(base.tokenizer, prompt)
    said.unsure.append("whether the prompt belongs into the base's chat template (--chat)")
    return prompt


def in_template(tokenizer: Any, prompt: str, after: str | None = None) -> str:
    """The prompt as a user's turn of a chat, up to where the answer begins; the tokenizer's own first token is left to it.

    Args:
        after: instead of what the template has behind the prompt.
    """
    mark = "\u2402"  # stands for the prompt: its braces are columns, those of the template are text
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": mark}], add_generation_prompt=True, tokenize=False
    )
    first = getattr(tokenizer, "bos_token", None)
    if first and text.startswith(first) and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]:
        text = text.removeprefix(first)
    before, _, behind = text.replace("{", "{{").replace("}", "}}").partition(mark)
    return f"{before}{prompt}{behind if after is None else after}"


def _answers(
    name: str,
    wanted: Wanted,
    before: Mapping[str, Any],
    found: Choice,
    names: Sequence[str],
    prompt: str,
    base: Outline | None,
    said: Said,
) -> tuple[list[str], list[Any]]:
    """The answers and the labels in their order; none for a free answer."""
    values = list(found.values)
    if (
        not wanted.answers
        and before.get("labels")
        and {str(v).lower() for v in values} <= {str(v).lower() for v in before["labels"]}
    ):
        return list(before["answers"]), list(before["labels"])
    if not wanted.answers and not values:
        return [], []
    if wanted.answers and not values:
        values = [value for value in sorted(found.counts)]
    if wanted.answers and len(wanted.answers) != len(values):
        told = ", ".join(map(str, values[:12])) + (", ..." if len(values) > 12 else "")
        expected = f"an answer for each of the {len(values)} labels {told}"
        raise CaloraError("--answers", expected, f"{len(wanted.answers)}: {', '.join(wanted.answers)}", "give them all")
    words = list(wanted.answers) or proposed_answers(values, names)
    labels = matched(values, words) if wanted.answers else values
    answers = _spaced(words, prompt, base)
    if not wanted.answers:
        if _begin_alike(name, prompt, answers, base) and len(values) <= len(LETTERS):
            words = list(LETTERS[: len(values)])
            answers = _spaced(words, prompt, base)
        said.unsure.append(
            "the words of the answers, proposed: a LoRA needs those that it was trained with (--answers)"
        )
    if base is not None:
        _task(name, prompt, answers).answer_token_ids(base.tokenizer)  # raises where two begin alike
    return answers, labels


def _spaced(words: Sequence[str], prompt: str, base: Outline | None) -> list[str]:
    """Words with the space that a decoder writes in front of them, unless the prompt ends with one."""
    space = "" if prompt[-1:].isspace() or (base is not None and base.kind == "encoder-decoder") else " "
    return [word if word[:1].isspace() else space + word for word in words]


def _begin_alike(name: str, prompt: str, answers: Sequence[str], base: Outline | None) -> bool:
    if base is None:
        return False
    try:
        _task(name, prompt, answers).answer_token_ids(base.tokenizer)
    except CaloraError:
        return True
    return False


def measure(
    prompt: str,
    answers: Sequence[str],
    rows: Sequence[Entry],
    label: Mapping[str, str],
    base: Outline | None,
    column: str,
) -> Lengths:
    """Tokens of prompts and answers, over a sample of the rows."""
    sample = random.Random(0).sample(list(rows), min(SAMPLE, len(rows)))
    task = _task("data", prompt)
    texts = [task.render(cells) for row in sample if all((cells := _texts(row, task)).values())]
    if not texts:
        raise CaloraError("--prompt", f"text in columns {', '.join(task.columns)}", "none in any row", "correct it")
    counted = [_tokens(text, base) for text in texts]
    replies: list[str] = list(answers)
    if not answers:
        columns = {column, *label.values()}
        for row in sample:
            value = next((row[name] for name in columns if row.get(name) is not None), None)
            given = answer_of(value, f"column '{column}'")
            replies += [given] if isinstance(given, str) else given or []
    answered = [_tokens(reply, base) for reply in replies] or [1]
    longest = _share(answered)
    written = 0 if answers else longest
    mean = sum(counted) / len(counted)
    return Lengths(mean, _share(counted), max(counted), longest, written, base is not None)


def _task(name: str, prompt: str, answers: Sequence[str] = ()) -> Task:
    """A task of which only the prompt and the answers are looked at."""
    return Task(name, prompt, tuple(answers), 1, 1)


def _texts(row: Entry, task: Task) -> dict[str, str]:
    return {name: "" if row.get(name) is None else str(row[name]) for name in task.columns}


def _tokens(text: str, base: Outline | None) -> int:
    return len(base.tokenizer(text).input_ids) if base is not None else int(len(text) / A_TOKEN) + 1


def _share(counts: Sequence[int]) -> int:
    """What 99 in 100 do not exceed."""
    return sorted(counts)[min(len(counts) - 1, int(0.99 * len(counts)))]


def _longest(lengths: Lengths, before: Mapping[str, Any], base: Outline | None, said: Said) -> int:
    """max_tokens: as it was where that still holds 99 in 100 prompts, else a multiple of 16 that does."""
    kept = int(before.get("max_tokens", 0))
    if kept >= lengths.most:
        return kept
    room = min(LONGEST, base.reads or LONGEST) if base is not None else LONGEST
    most = min(-(-lengths.most // STEP) * STEP, room)
    if lengths.most > most:
        said.unsure.append(
            f"prompts of more than {most} tokens lose their beginning (the longest has {lengths.longest})"
        )
    return most


def describe(
    source: Source, splits: Mapping[str, str], found: Choice, entry: Entry, lengths: Lengths, said: Said
) -> None:
    """What the command tells of the data."""
    sizes = ", ".join(f"{len(source.rows[place])} {split}" for split, place in splits.items())
    lines = [
        f"{sizes} rows; columns {', '.join(dict.fromkeys(name for row in source.rows['train'][:100] for name in row))}"
    ]
    if entry["answers"]:
        pairs = zip(entry["labels"], entry["answers"], strict=True)
        each = [f"{value} ({_count(found, value)}) answered {answer!r}" for value, answer in pairs]
        shown = ", ".join(each[:6]) + (f", ... ({len(each)} in all)" if len(each) > 6 else "")
        lines.append(f"label '{found.column}': {shown}")
    else:
        lines.append(f"answer '{found.column}': free text, up to {lengths.answer} tokens")
    if found.missing:
        lines.append(
            f"{found.missing} rows without a label: unlabelled texts for training, left out of validation and test"
        )
    about = "" if lengths.counted else " (guessed from letters: the base is not on this machine yet)"
    lines.append(
        f"prompts of {lengths.mean:.0f} tokens, 99 % up to {lengths.most}, the longest {lengths.longest}{about}"
    )
    said.add("data", *lines)
    said.add("prompt", entry["prompt"])


def pools(params: Params, name: str) -> dict[str, int]:
    """Labelled rows of each split as the stage `download` has them, which reads every row; and `unlabelled` ones.

    Raises:
        CaloraError: a row does not fit, or a split has none.
    """
    source = params.data.sets[name]
    found = split_pools(params, source, task_of(name, source))
    labelled = {split: sum(row["label"] is not None for row in rows) for split, rows in found.items()}
    if empty := [split for split, count in labelled.items() if not count]:
        told = f"{len(found[empty[0]])} rows, none with a label"
        raise CaloraError(
            "--data", f"labelled rows for the {empty[0]} split (a text counts once)", told, "give more rows"
        )
    sizes = params.data.sizes
    used = {
        split: min(count, getattr(sizes, split))
        for split, count in sorted(labelled.items(), key=lambda item: SPLITS.index(item[0]))
    }
    return {**used, "unlabelled": min(sizes.unlabelled, len(found["train"]) - used["train"])}


def _count(found: Choice, value: object) -> int:
    wanted = str(value).lower()
    return sum(count for known, count in found.counts.items() if known.lower() == wanted)
