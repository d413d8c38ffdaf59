"""The prompt and the words of the answers: as they are given, as they were, or proposed."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from calora.errors import CaloraError
from pipeline.adopt.columns import Choice, columns_of, matched, proposed_answers, proposed_prompt, text_columns
from pipeline.adopt.lengths import sketch
from pipeline.adopt.options import Options
from pipeline.adopt.wanted import Entry, Said, Wanted

if TYPE_CHECKING:
    from calora.preview.outline import Outline

LETTERS = string.ascii_uppercase  # they stand for labels that are no words


def prompt_of(
    name: str,
    wanted: Wanted,
    before: Mapping[str, Any],
    rows: Sequence[Entry],
    found: Choice,
    brought: Options | None,
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
        texts = text_columns(rows, found.column, brought.columns if brought else ())
        prompt = proposed_prompt(texts, found.column, bool(found.values) and not brought)
        said.unsure.append(
            "the prompt, proposed from the columns: a LoRA needs the one that it was trained with (--prompt)"
        )
    sketch(name, prompt)  # raises where it is no prompt
    for column in columns_of(prompt):
        if column not in columns:
            raise CaloraError("--prompt", f"columns among {', '.join(sorted(columns))}", f"{{{column}}}", "correct it")
    if wanted.chat and (base is None or not base.chat):
        there = "a base without one" if base else "no base on this machine yet"
        raise CaloraError("--chat", "a base with a chat template", there, "leave it out, or give --base")
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


def answers_of(
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
    if found.column is None:
        return spaced(wanted.answers, prompt, base), []
    if wanted.answers and not values:
        values = [value for value in sorted(found.counts)]
    if wanted.answers and len(wanted.answers) != len(values):
        told = ", ".join(map(str, values[:12])) + (", ..." if len(values) > 12 else "")
        expected = f"an answer for each of the {len(values)} labels {told}"
        raise CaloraError("--answers", expected, f"{len(wanted.answers)}: {', '.join(wanted.answers)}", "give them all")
    words = list(wanted.answers) or proposed_answers(values, names)
    labels = matched(values, words) if wanted.answers else values
    answers = spaced(words, prompt, base)
    if not wanted.answers:
        if _begin_alike(name, prompt, answers, base) and len(values) <= len(LETTERS):
            words = list(LETTERS[: len(values)])
            answers = spaced(words, prompt, base)
        said.unsure.append(
            "the words of the answers, proposed: a LoRA needs those that it was trained with (--answers)"
        )
    return answers, labels


def spaced(words: Sequence[str], prompt: str, base: Outline | None) -> list[str]:
    """Words with the space that a decoder writes in front of them, unless the prompt ends with one."""
    space = "" if prompt[-1:].isspace() or (base is not None and base.kind == "encoder-decoder") else " "
    return [word if word[:1].isspace() else space + word for word in words]


def _begin_alike(name: str, prompt: str, answers: Sequence[str], base: Outline | None) -> bool:
    if base is None:
        return False
    try:
        base.check_answers(sketch(name, prompt, answers))
    except CaloraError:
        return True
    return False
