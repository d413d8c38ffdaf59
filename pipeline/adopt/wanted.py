"""What the command is given, and what it finds: the words between its parts."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from calora.errors import CaloraError, first_line

HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
T = TypeVar("T")


@dataclass(frozen=True)
class Wanted:
    """The options of `python -m pipeline adopt`; what is empty is found out, or left as it is.

    Args:
        base, adapter: a folder, a GGUF file (the base), or a hub id with a revision, `owner/name@revision`.
        data: files, a folder, or a hub id; `subset` of that one.
        validation, test: files of their own.
        prompt, answers, label: of the task.
        columns: names of the columns, of csv and tsv files that have no line of them.
        name: of the task.
        chat: put the prompt into the base's chat template.
        copy: copy files into own/ instead of linking them.
    """

    base: str | None = None
    adapter: str | None = None
    data: tuple[str, ...] = ()
    validation: str | None = None
    test: str | None = None
    prompt: str | None = None
    answers: tuple[str, ...] = ()
    label: str | None = None
    columns: tuple[str, ...] = ()
    name: str | None = None
    subset: str | None = None
    chat: bool = False
    copy: bool = False


@dataclass
class Said:
    """What the command tells: what it found, by part, and what it could not tell."""

    found: list[tuple[str, str]] = field(default_factory=list)
    unsure: list[str] = field(default_factory=list)

    def add(self, part: str, *lines: str) -> None:
        """Lines about a part."""
        self.found.append((part, "\n".join(lines)))


@dataclass(frozen=True)
class HubId:
    """A repository of the hub at one commit."""

    repo: str
    revision: str


def hub_id(text: str, kind: str, option: str) -> HubId:
    """`owner/name@revision` (a commit, a branch or a tag; without it the newest commit), with the commit that it is now.

    Args:
        kind: `model` or `dataset`.

    Raises:
        CaloraError: it is no id, or the hub does not answer with it.
    """
    match = HUB_ID.fullmatch(text)
    if match is None:
        expected = "a folder or file that is there, or a hub id such as owner/name@revision"
        raise CaloraError(option, expected, repr(text), "correct it")
    from huggingface_hub import HfApi

    about = HfApi().dataset_info if kind == "dataset" else HfApi().model_info
    info = asked(f"{option} {text}", lambda: about(match["repo"], revision=match["revision"]))
    return HubId(match["repo"], str(info.sha))


def asked(where: str, act: Callable[[], T]) -> T:
    """What the hub answers; its client's many kinds of errors are one line."""
    try:
        return act()
    except Exception as error:
        fix = "check the name, the network and the login, or name a folder"
        raise CaloraError(where, "a path that is there, or an answer of the hub", first_line(error), fix) from None


def shown(path: Path) -> str:
    """A path as params.yaml names it: relative where it is inside the project."""
    whole, root = path.absolute(), Path.cwd()
    return whole.relative_to(root).as_posix() if whole.is_relative_to(root) else str(whole)


def plain(text: str) -> str:
    """A name of letters, digits and _ out of any text."""
    return re.sub("[^A-Za-z0-9]+", "_", text).strip("_").lower()


def million(count: float) -> str:
    """A number of parameters."""
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M" if count < 1e7 else f"{count / 1e6:.1f} M"


Entry = dict[str, Any]
