"""Tokens of prompts and answers, and the longest prompt that follows."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from calora.errors import CaloraError
from calora.models.tasks import Task
from pipeline.adopt.wanted import Entry, Said
from stages.cells import answer_of

if TYPE_CHECKING:
    from calora.preview.outline import Outline

SAMPLE = 2000  # rows whose tokens are counted
A_TOKEN = 3.0  # letters that it has at least, about, where the tokenizer is not at hand
STEP = 16  # max_tokens is a multiple of it
LONGEST = 4096  # that is proposed
UNTOLD = 32  # tokens of a written answer of which no file has an example


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


def measure(
    prompt: str,
    answers: Sequence[str],
    rows: Sequence[Entry],
    labels: Sequence[str],
    base: Outline | None,
) -> Lengths:
    """Tokens of prompts and answers, over a sample of the rows.

    Args:
        labels: names that the column of the answers may have.
    """
    sample = random.Random(0).sample(list(rows), min(SAMPLE, len(rows)))
    task = sketch("data", prompt)
    texts = [task.render(cells) for row in sample if all((cells := _texts(row, task)).values())]
    if not texts:
        raise CaloraError("--prompt", f"text in columns {', '.join(task.columns)}", "none in any row", "correct it")
    counted = [_tokens(text, base) for text in texts]
    replies: list[str] = list(answers)
    if not answers:
        for row in sample:
            value = next((row[name] for name in labels if row.get(name) is not None), None)
            given = answer_of(value, f"column '{', '.join(labels)}'")
            replies += [given] if isinstance(given, str) else given or []
    answered = [_tokens(reply, base) for reply in replies] or [UNTOLD]
    longest = _share(answered)
    written = 0 if answers else longest
    mean = sum(counted) / len(counted)
    return Lengths(mean, _share(counted), max(counted), longest, written, base is not None)


def longest(lengths: Lengths, before: Mapping[str, Any], base: Outline | None, said: Said) -> int:
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


def sketch(name: str, prompt: str, answers: Sequence[str] = ()) -> Task:
    """A task of which only the prompt and the answers are looked at."""
    return Task(name, prompt, tuple(answers), 1, 1)


def _texts(row: Entry, task: Task) -> dict[str, str]:
    return {name: "" if row.get(name) is None else str(row[name]) for name in task.columns}


def _tokens(text: str, base: Outline | None) -> int:
    return len(base.tokenizer(text).input_ids) if base is not None else int(len(text) / A_TOKEN) + 1


def _share(counts: Sequence[int]) -> int:
    """What 99 in 100 do not exceed."""
    return sorted(counts)[min(len(counts) - 1, int(0.99 * len(counts)))]
