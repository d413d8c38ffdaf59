"""What a cell of a data file says: a text, a label, an answer."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from calora.errors import CaloraError


def text_of(value: Any) -> Any:
    """A number's text; None for a number that is missing; all else as it is."""
    if isinstance(value, float) and math.isnan(value):
        return None
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def filled_text(value: Any) -> str | None:
    """The text of a cell, or of its number; None where there is none."""
    value = text_of(value)
    return value if isinstance(value, str) and value.strip() else None


def _key(value: Any) -> str | None:
    """What a label is found by: true and "True", 1 and "1" and 1.0 are one; None where it is missing."""
    if isinstance(value, bool):
        return str(value).lower()
    value = text_of(value)
    if not isinstance(value, str) or not value.strip():
        return None
    value = value.strip()
    return value.lower() if value.lower() in ("true", "false") else re.sub(r"^(-?\d+)\.0+$", r"\1", value)


def places_of(labels: Sequence[object], where: str) -> dict[str, int]:
    """What each label is found by, and its place; a list of labels is one label, however a file writes it."""
    every = [
        (place, one) for place, label in enumerate(labels) for one in (label if isinstance(label, list) else [label])
    ]
    places = {key: place for place, label in every if (key := _key(label)) is not None}
    if len(places) < len(every):
        raise CaloraError(where, "labels that differ", labels, "correct them in params.yaml")
    return places


def label_of(value: Any, places: Mapping[str, int], where: str, missing: Sequence[object] = ()) -> int | None:
    """The place of a label; None where it is missing, which GLUE's test sets write as -1, and other files as one of `missing`."""
    key = _key(value)
    if key is not None and key in places:
        return places[key]
    if key in ("-1", *map(_key, missing)) or value is None or (key is None and isinstance(value, str | float)):
        return None
    fix = "check `labels` in params.yaml (YAML reads yes, no and null as no texts: quote them)"
    raise CaloraError(where, f"a label among {', '.join(places):.200}", repr(value)[:80], fix)


def by_text(texts: Sequence[str]) -> dict[str, int]:
    """What a label that is the right answer's text is found by; of two that are alike the first."""
    return {str(_key(text)): place for place, text in reversed(list(enumerate(texts)))}


def choices_of(value: Any) -> tuple[list[str], list[str]] | None:
    """The texts of a list of choices, and what each is called; None where there is no such list.

    A list of texts, whose names are 0, 1, ..., and `{text: [...], label: [...]}`, as ARC and CommonsenseQA have it.
    """
    names: Any = None
    if isinstance(value, Mapping):
        value, names = value.get("text"), value.get("label")
    if not isinstance(value, Sequence) or isinstance(value, str):
        return None
    texts = [text_of(one) for one in value]
    names = list(range(len(texts))) if names is None else names
    if len(texts) < 2 or not all(isinstance(one, str) and one.strip() for one in texts) or len(names) != len(texts):
        return None
    return texts, [str(name) for name in names]


def answer_of(value: Any, where: str) -> str | list[str] | None:
    """The texts of an answer; None where there is none.

    SQuAD's `{text: [...], answer_start: [...]}`, a list of such, a list of texts, a text, and numbers are understood.
    """
    texts = [text for text in _texts(value, where) if text.strip()]
    return texts[0] if len(texts) == 1 else texts or None


def _texts(value: Any, where: str) -> list[str]:
    if isinstance(value, Mapping) and "text" in value:
        return _texts(value["text"], where)
    if isinstance(value, list):
        return [text for part in value for text in _texts(part, where)]
    value = str(value).lower() if isinstance(value, bool) else text_of(value)
    if value is None or isinstance(value, str):
        return [value] if value else []
    raise CaloraError(
        where, "a text, a number, texts, or {text: [...]}", repr(value)[:80], "name another `label` column"
    )
