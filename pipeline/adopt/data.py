"""Look at data: the entry of data.sets that it asks for, and the lengths of its texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from calora.errors import CaloraError
from pipeline.adopt.columns import Choice, choice, columns_of
from pipeline.adopt.files import Source
from pipeline.adopt.lengths import Lengths, longest, measure, sketch
from pipeline.adopt.options import Options, in_columns, listed, options
from pipeline.adopt.own import Own
from pipeline.adopt.ready import entry_of, ready, renamed
from pipeline.adopt.splits import keep_splits, label_entry, named_label, tested, with_label
from pipeline.adopt.wanted import Entry, Said, Wanted
from pipeline.adopt.words import answers_of, prompt_of, spaced
from stages.config import Files, HubData, Params
from stages.corpora import SPLITS, split_pools, task_of
from stages.download import usable

if TYPE_CHECKING:
    from calora.preview.outline import Outline

MORE = ("likelihood", "metrics", "columns", "missing", "incomplete")  # keys of an entry that only people write


def look(
    source: Source,
    wanted: Wanted,
    name: str,
    before: Mapping[str, Any] | None,
    base: Outline | None,
    own: Own,
    said: Said,
    taught: bool = False,
) -> tuple[Entry, Lengths]:
    """The entry of a task, and the lengths of its texts.

    What the command line does not say stays as the entry of `before` has it, as long as that fits the data.

    Args:
        taught: whether the task has an adapter to learn from: then there may be no labels.

    Raises:
        CaloraError: a column, a label or an answer does not fit.
    """
    train = source.rows["train"]
    if not train:
        raise CaloraError("--data", "rows for training", "none", "name a file that has rows")
    before = before or {}
    keep_splits(source, before, name)
    if made := ready(name, before, source, wanted):
        return _as_ready(made, source, wanted, name, before, base, own, said)
    before = before if before.get("source") == source.entry["source"] else {}
    splits, label = tested(source, named_label(source, wanted, before, taught), taught, said)
    column = next((label[place] for place in splits.values() if label[place]), None)
    told = [
        row for place in splits.values() if label[place] for row in with_label(source.rows[place], label[place], column)
    ]
    names = source.label_names.get(column or "", ())
    found = choice(told, column, names)
    brought = _options(wanted, before, told, column)
    prompt = prompt_of(name, wanted, before, train, found, brought, base, said)
    if brought:
        answers, labels = spaced(brought.answers, prompt, base), list(brought.labels)
    else:
        answers, labels = answers_of(name, wanted, before, found, names, prompt, base, said)
    if base is not None:
        base.check_answers(sketch(name, prompt, answers))
    rows = [row for place in splits.values() for row in source.rows[place]]
    lengths = measure(prompt, answers, rows, [name for name in label.values() if name], base)
    entry: Entry = {
        **source.entry, **_places(source, splits, name, own), "label": label_entry(splits, label),
        "labels": labels, "prompt": prompt, "answers": answers,
        "max_tokens": longest(lengths, before, base, said),
        "max_new_tokens": before.get("max_new_tokens", 4) if answers else max(lengths.answer, before.get("max_new_tokens", 0)),
    }  # fmt: skip
    describe(source, splits, found, entry, lengths, said)
    return {**{key: value for key, value in before.items() if key in MORE}, **entry}, lengths


def _as_ready(
    made: Files | HubData, source: Source, wanted: Wanted, name: str, before: Mapping[str, Any], base: Outline | None,
    own: Own, said: Said,
) -> tuple[Entry, Lengths]:  # fmt: skip
    """The entry of a task that is ready (`pipeline.adopt.ready`), and the lengths of its texts."""
    task, train = task_of(name, made), source.rows["train"]
    column = next(one for one in made.labels_of("train") if any(one in row for row in train))
    splits, label = tested(source, column, False, said)
    told = [row for place in splits.values() for row in with_label(source.rows[place], label[place], column)]
    found = choice(told, column)
    needed = [*task.columns, *task.answer_columns]
    rows = [row for place in splits.values() for row in renamed(made, source.rows[place], needed)]
    prompt = made.prompt
    if wanted.prompt or wanted.chat:
        prompt = prompt_of(name, wanted, {"prompt": prompt}, rows, found, None, base, said)
    if base is not None:
        base.check_answers(sketch(name, prompt, made.answers))
    lengths = measure(prompt, made.answers, rows, [name for name in label.values() if name], base)
    if lengths.most > made.max_tokens:
        said.unsure.append(
            f"prompts of more than {made.max_tokens} tokens lose their beginning; 99 % have up to {lengths.most} (`max_tokens`)"
        )
    entry = entry_of(made, before, source.entry, _places(source, splits, name, own))
    if prompt != made.prompt:
        entry["prompt"] = prompt
    whole = {**made.model_dump(include={"labels", "answers"}), "prompt": prompt}
    describe(source, splits, found, whole, lengths, said)
    return entry, lengths


def _places(source: Source, splits: Mapping[str, str], name: str, own: Own) -> dict[str, str | None]:
    return {split: source.placed(splits[split], name, own) if split in splits else None for split in SPLITS}


def _options(wanted: Wanted, before: Mapping[str, Any], rows: Sequence[Entry], column: str | None) -> Options | None:
    """The answers that rows bring: as they are given, or as they were, or found."""
    if column is None or (wanted.answers and not all(map(columns_of, wanted.answers))):
        return None
    known = {name for row in rows for name in row}
    kept = list(wanted.answers) or [answer for answer in before.get("answers", []) if columns_of(answer)]
    columns = [name for answer in kept for name in columns_of(answer)]
    if not kept or (not wanted.answers and not set(columns) <= known):
        return options(rows, column)
    if wrong := [name for name in columns if name not in known]:
        raise CaloraError("--answers", f"columns among {', '.join(sorted(known))}", f"{{{wrong[0]}}}", "correct it")
    found = listed(rows, column, columns[0]) if len(kept) == 1 else in_columns(rows, column, columns)
    if found is None:
        raise CaloraError(f"label '{column}'", f"which of {', '.join(kept)} is right", "something else", "give --label")
    return replace(found, answers=tuple(kept))


def describe(
    source: Source, splits: Mapping[str, str], found: Choice, entry: Entry, lengths: Lengths, said: Said
) -> None:
    """What the command tells of the data."""
    sizes = ", ".join(f"{len(source.rows[place])} {split}" for split, place in splits.items())
    lines = [
        f"{sizes} rows; columns {', '.join(dict.fromkeys(name for row in source.rows['train'][:100] for name in row))}"
    ]
    lines.append(_answered(found, entry, lengths))
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
    """Rows of each split, labelled ones where the set has labels, as the stage `download` has them, which reads every row; and `unlabelled` ones.

    Raises:
        CaloraError: a row does not fit, or a split has none.
    """
    source = params.data.sets[name]
    found = split_pools(params, source, task_of(name, source))
    labelled = {split: len(usable(rows, source.has_labels(split))) for split, rows in found.items()}
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


def _answered(found: Choice, entry: Entry, lengths: Lengths) -> str:
    """A line on the label and the answers."""
    answers, labels = entry["answers"], entry["labels"]
    column = f"label '{found.column}'" if found.column else "no labels"
    if not answers:
        return f"{column}: free text, up to {lengths.answer} tokens"
    if not labels:
        right = ": the one whose text it is, or its name in the list" if found.column else ""
        return f"{column}: one of {', '.join(map(repr, answers))}{right}"
    if len(labels) != len(answers):
        return f"{column}: one of as many as {answers[0]!r} has, called {', '.join(map(str, labels))}"
    each = [
        f"{' or '.join(map(str, value)) if isinstance(value, list) else value} ({_count(found, value)}) answered {answer!r}"
        for value, answer in zip(labels, answers, strict=True)
    ]
    return f"{column}: {', '.join(each[:6])}" + (f", ... ({len(each)} in all)" if len(each) > 6 else "")


def _count(found: Choice, value: object) -> int:
    wanted = [str(one).lower() for one in (value if isinstance(value, list) else [value])]
    return sum(count for known, count in found.counts.items() if known.lower() in wanted)
