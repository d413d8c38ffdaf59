"""Which models an exported folder has: its base and its adapters, each with the LoRAs that have to be on."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calora.device.entries import check_made_for, read_entries
from calora.device.folder import NAME, check_file, read_folder
from calora.errors import CaloraError
from calora.models.tasks import Task

BASE_NAME = "base"  # as a model


class NoSuchModel(Exception):
    """None of that name is served."""


def unknown(name: str, known: Iterable[str]) -> NoSuchModel:
    """What to raise where a name is none of those."""
    return NoSuchModel(f"The model {name!r:.100} is not served here; these are: {', '.join(known)}")


@dataclass(frozen=True)
class Model:
    """One that a request may choose.

    Args:
        name: of the adapter, or `base`.
        apply: the LoRA files that are on, relative to the folder: the base's recovery, if it has one, and the adapter.
        task: the adapter's, with its prompt and answers; None for the base.
        method: what made the adapter, such as `calora`; None for the base.
        base_bytes: of the files that the base alone needs, and this model too.
        adapter_bytes: of those that come on top.
    """

    name: str
    apply: tuple[str, ...]
    task: Task | None = None
    method: str | None = None
    base_bytes: int = 0
    adapter_bytes: int = 0


@dataclass(frozen=True)
class Catalogue:
    """An exported folder, checked.

    Args:
        folder: where it is.
        base: its GGUF file.
        context: most tokens that the model reads.
        models: by name, the base first; some may come and go.
        fingerprint: of this base.
        uncompressed: fingerprint of the base that it was made of; the same where nothing was compressed.
    """

    folder: Path
    base: Path
    context: int
    models: dict[str, Model]
    fingerprint: str = ""
    uncompressed: str = ""

    @classmethod
    def read(cls, folder: Path) -> Catalogue:
        """Read and check manifest.json and all files that are served.

        Raises:
            CaloraError: it is no such folder, has no GGUF, a file is missing, truncated or another one, or an adapter is
                for another base.
        """
        about = read_folder(folder)
        models, base = _models(folder, about), folder / about["base"]["file"]
        made = about["compressed_fingerprint"], about["base_fingerprint"]
        found = cls(folder, base, int(about["context"]), models, *made)
        for path in found.loras.values():
            check_made_for(path, found.fingerprint, base)
        return found

    @property
    def compressed(self) -> bool:
        """Whether this base is another one than the uncompressed base."""
        return self.fingerprint != self.uncompressed

    @property
    def loras(self) -> dict[str, Path]:
        """Every LoRA file that some model needs, each once."""
        files = dict.fromkeys(file for model in self.models.values() for file in model.apply)
        return {file: self.folder / file for file in files}

    def __getitem__(self, name: str) -> Model:
        """A model; raises `NoSuchModel`."""
        if name not in self.models:
            raise unknown(name, self.models)
        return self.models[name]

    def listed(self, changed: Collection[str] = ()) -> dict[str, Model]:
        """The models that manifest.json has now; those that are new, other ones, or use one of the files `changed` are checked.

        Raises:
            CaloraError: the folder is broken, or has another base.
        """
        about = read_folder(self.folder, whole=False)
        if about["compressed_fingerprint"] != self.fingerprint:
            found = about["compressed_fingerprint"]
            raise CaloraError(self.folder, f"the base {self.fingerprint}", found, "start the server again")
        models = _models(self.folder, about)
        for name, model in models.items():
            if model != self.models.get(name) or not set(model.apply).isdisjoint(changed):
                for file in model.apply:
                    check_file(self.folder / file, about["files"][file])
                    check_made_for(self.folder / file, self.fingerprint, self.base)
        return models

    def opened(self, name: str, path: str, allowed: Collection[Path] = ()) -> Model:
        """A model of an adapter that `calora export` wrote for this base, whether manifest.json has it or not.

        Args:
            path: relative to the folder, or absolute.
            allowed: folders that it may be in, besides the served one.

        Raises:
            CaloraError: it is elsewhere, no such file, truncated, or for another base; or the name is none.
        """
        if not re.fullmatch(NAME, name):
            raise CaloraError("lora_name", "letters, digits, _ and -", repr(name), "choose such a name")
        try:
            file = (self.folder / path).resolve()
            there = file.is_file()
        except (OSError, ValueError):  # such as a name that is too long
            raise NoSuchModel(f"There is no file {path!r:.100}") from None
        if not any(file.is_relative_to(place.resolve()) for place in (self.folder, *allowed)):
            fix = "copy it there, or start the server with --allow and its folder"
            raise CaloraError("lora_path", f"a file in {self.folder}", path, fix)
        if not there:
            raise NoSuchModel(f"There is no file {path!r:.100}")
        entries = read_entries(file)
        if not {"task", "recovery"} <= entries.keys():
            raise CaloraError(file, "an adapter that `calora export` wrote", "another file", "export it again")
        check_made_for(file, self.fingerprint, self.base)
        base, task = self.models[BASE_NAME], Task.from_json(json.loads(entries["task"]))
        always, size = (
            (base.apply, base.base_bytes) if entries["recovery"] == "beside" else ((), self.base.stat().st_size)
        )
        return Model(name, (*always, str(file)), task, entries.get("method"), size, file.stat().st_size)


def _models(folder: Path, about: Mapping[str, Any]) -> dict[str, Model]:
    """What manifest.json says of them."""
    if not about["base"]:
        raise CaloraError(folder, "base.gguf", "an export without it", "export it with --kind gguf")
    models = {BASE_NAME: _model(folder, about, BASE_NAME, about["base"])}
    for name, entry in about["adapters"].items():
        if name == BASE_NAME:
            fix = "export it under another name: NAME=FOLDER"
            raise CaloraError(f"{folder}, adapters", f"names other than '{BASE_NAME}'", name, fix)
        models[name] = _model(folder, about, name, entry)
    return models


def _model(folder: Path, about: Mapping[str, Any], name: str, entry: Mapping[str, Any]) -> Model:
    """One of a manifest.json."""
    shared = {about["base"]["file"], *about["base"]["apply"]}
    sizes = {True: 0, False: 0}
    for file in dict.fromkeys([about["base"]["file"], *entry["apply"]]):
        if file not in about["files"]:
            raise CaloraError(folder, "files that manifest.json lists", file, "export it again")
        sizes[file in shared] += about["files"][file]["bytes"]
    task = Task.from_json(entry["task"]) if "task" in entry else None
    return Model(name, tuple(entry["apply"]), task, entry.get("method"), sizes[True], sizes[False])
