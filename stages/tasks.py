"""Tasks that stages/tasks.yaml has ready: `like: NAME` in an entry of data.sets takes what the entry does not say from there."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

READY = Path(__file__).with_suffix(".yaml")
SPLITS = ("train", "validation", "test")


def filled(entry: Any) -> Any:
    """An entry of data.sets in full: from the hub, or from the files in `folder` where it names one.

    Raises:
        ValueError: tasks.yaml has no such task, or is none of ours.
    """
    if not isinstance(entry, Mapping) or "like" not in entry:
        return entry
    own = {key: value for key, value in entry.items() if key not in ("like", "folder")}
    task = dict(_task(entry["like"]))
    hub, files = task.pop("hub"), task.pop("files")
    if entry.get("folder") is None:
        return {"source": "hub", **hub, **task, **own}
    folder = str(entry["folder"]).rstrip("/")
    places = {split: _inside(folder, own.pop(split, files[split])) for split in SPLITS}
    return {"source": "files", **places, **task, **own}


def _task(name: object) -> Mapping[str, Any]:
    try:
        tasks = _parsed(READY.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{READY.name} with the tasks that are ready ({' '.join(str(error).split())})") from None
    if not isinstance(name, str) or name not in tasks:
        raise ValueError(f"`like` with one of {', '.join(tasks)} ({name!r} is none)")
    found: Mapping[str, Any] = tasks[name]
    return found


@cache  # it is asked for every entry
def _parsed(text: str) -> Any:
    return yaml.safe_load(text)


def _inside(folder: str, names: Any) -> Any:
    """File names as paths; those that were written as paths stay, and so does what is no name."""
    if isinstance(names, str):
        names = [names]
    if not isinstance(names, list):
        return names
    return [f"{folder}/{name}" if isinstance(name, str) and "/" not in name else name for name in names]
