"""Edit params.yaml: whatever is not changed stays as it is written, comments too."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from difflib import unified_diff
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from calora.common.files import write_text
from calora.errors import CaloraError
from pipeline.adopt.wanted import Entry
from pipeline.values import editor, quoted
from stages.config import PARAMS, Params, asks_for_labels, load_params
from stages.resolve import resolve

if TYPE_CHECKING:
    from calora.preview.outline import Outline

FREE, UNLABELLED, INHERITED = (
    "calora_free",
    "calora_unlabelled",
    "clm_inherited",
)  # of params.yaml, where they are still there
PLAIN = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_./-"
ROLES = {  # what other families call a layer of attention, the likeliest first
    "q_proj": ("q", "query", "qkv_proj", "query_key_value", "Wqkv"), "k_proj": ("k", "key", "qkv_proj", "query_key_value", "Wqkv"),
    "v_proj": ("v", "value", "qkv_proj", "query_key_value", "Wqkv"), "o_proj": ("o", "out_proj", "dense"),
}  # fmt: skip


class Document:
    """params.yaml, read and changed; `save` writes it whole or not at all."""

    def __init__(self, path: Path = PARAMS) -> None:
        load_params(path)  # a file that is wrong already is told as ever
        self._path, self._yaml = path, editor()
        self.before = path.read_text(encoding="utf-8")
        self.values: Any = self._yaml.load(self.before)
        self.changed: list[str] = []

    def set(self, key: str, value: Any) -> None:
        """Give a key of dots its value, unless it has that; an entry that is new comes first in its section."""
        *parents, last = key.split(".")
        section = self.values
        for parent in parents:
            section = section[parent]
        old = section.get(last)
        if old == value and last in section:
            return
        self.changed.append(key)
        if isinstance(old, CommentedMap) and isinstance(value, Mapping) and not old.merge:
            _update(old, value)
        elif last in section:
            section[last] = written(value)
        else:
            section.insert(0, last, written(value))

    @property
    def text(self) -> str:
        """As it would be written."""
        if not self.changed:
            return self.before
        stream = io.StringIO()
        self._yaml.dump(self.values, stream)
        return stream.getvalue()

    @property
    def diff(self) -> str:
        """What changes, as a unified diff."""
        before, after = (text.splitlines(keepends=True) for text in (self.before, self.text))
        return "".join(unified_diff(before, after, n=1))

    def check(self) -> Params:
        """The values as the stages read them; raises `CaloraError` where they would."""
        with TemporaryDirectory() as scratch:
            path = Path(scratch) / PARAMS.name
            path.write_text(self.text, encoding="utf-8")
            try:
                return load_params(path)
            except CaloraError as error:
                error.args = (str(error).replace(str(path), PARAMS.name),)
                raise

    def save(self) -> None:
        """Write it, if anything changed."""
        if self.changed:
            write_text(self._path, self.text)


def _update(section: CommentedMap, value: Mapping[str, Any]) -> None:
    """Make a section this one, in this order; a key that stays keeps its comment, and what follows the last one stays there."""
    kept, last = dict(section), next(reversed(section))
    comments = dict(section.ca.items)
    for key in list(section):
        del section[key]
    for key, new in value.items():
        section[key] = kept[key] if key in kept and kept[key] == new else written(new)
    section.ca.items.update({key: comment for key, comment in comments.items() if key in value})
    if last not in value and last in comments:
        section.ca.items.setdefault(next(reversed(section)), comments[last])


def written(value: Any) -> Any:
    """A value as a person would write it: lists in one line, quotes around texts that are more than a word."""
    if isinstance(value, Mapping):
        made = CommentedMap({key: written(one) for key, one in value.items()})
        if len(made) <= 2 and all(not isinstance(one, CommentedMap | CommentedSeq) for one in made.values()):
            made.fa.set_flow_style()
        return made
    if isinstance(value, list | tuple):
        sequence = CommentedSeq([written(one) for one in value])
        sequence.fa.set_flow_style()
        return sequence
    if isinstance(value, str) and (not value or set(value) - set(PLAIN) or value[0] == "-"):
        return DoubleQuotedScalarString(value)
    return quoted(value)


def retarget(document: Document, base: Outline) -> None:
    """Let the teacher and the methods name layers that the base has: others are translated, or all of its layers."""
    _one(document, "teacher.targets", document.values["teacher"]["targets"], base)
    for name, method in document.values["methods"].items():
        start = method.get("start") or {}
        for part in ("bypass", "lora"):
            own = start.get(part)
            if isinstance(own, Mapping) and "targets" in own:
                _one(document, f"methods.{name}.start.{part}.targets", own["targets"], base)


def _one(document: Document, key: str, targets: Sequence[str], base: Outline) -> None:
    from calora.adapters.lora import check_targets

    try:
        check_targets(base.model, targets, 1)
    except CaloraError:
        parts = base.parts
        found = [next((one for one in (target, *ROLES.get(target, ())) if one in parts), None) for target in targets]
        document.set(key, parts if None in found else list(dict.fromkeys(map(str, found))))


def learns_from_labels(entry: Entry) -> bool:
    """Whether the training texts of an entry of data.sets have labels."""
    label = entry.get("label", "")
    return (label.get("train") if isinstance(label, Mapping) else label) is not None


def without_labels(document: Document) -> None:
    """Let the run compare methods that ask for no label, CA-LoRA from the texts alone among them."""
    methods = resolve(document.values["methods"])
    free = [name for name in document.values["compare"] if not asks_for_labels(methods[name])]
    if len(free) == len(document.values["compare"]):
        return
    document.set("compare", [*free, *(name for name in (FREE, UNLABELLED) if name in methods and name not in free)])
    if UNLABELLED in methods:
        document.set("evaluate.ours", UNLABELLED)
        document.set("evaluate.packed", [UNLABELLED])
    if INHERITED in free:
        document.set("evaluate.baseline", INHERITED)


def first_that_fits(document: Document, fits: Entry) -> list[str]:
    """The recipes of the run without those that the base cannot take; the first that it can where none is left."""
    kept = [name for name in document.values["recipes"] if fits.get(name)]
    return kept or [name for name, fit in fits.items() if fit][:1] or list(document.values["recipes"])
