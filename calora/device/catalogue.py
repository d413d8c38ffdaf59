"""Which models an exported folder has: its base and its adapters, each with the LoRAs that have to be on."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calora.device.entries import read_entries
from calora.device.folder import NAME, check_file, check_made_for, read_folder
from calora.errors import CaloraError
from calora.models.tasks import Task

BASE_NAME = "base"  # as a model


class NoSuchModel(Exception):
    """None of that name is served."""


@dataclass(frozen=True)
class Model:
    """One that a request may choose.

    Args:
        name: of the adapter, or `base`.
        apply: the LoRA files that are on, relative to the folder: the base's recovery, if it has one, and the adapter.
        task: the adapter's, with its prompt and answers; None for the base.
    """

    name: str
    apply: tuple[str, ...]
    task: Task | None = None


@dataclass(frozen=True)
class Catalogue:
    """An exported folder, checked.

    Args:
        folder: where it is.
        base: its GGUF file.
        context: most tokens that the model reads.
        models: by name, the base first; some may come and go.
        fingerprint: of the compressed base.
    """

    folder: Path
    base: Path
    context: int
    models: dict[str, Model]
    fingerprint: str = ""

    @classmethod
    def read(cls, folder: Path) -> Catalogue:
        """Read and check manifest.json and all files that are served.

        Raises:
            CaloraError: it is no such folder, has no GGUF, a file is missing, truncated or another one, or an adapter is
                for another base.
        """
        about = read_folder(folder)
        models, base = _models(folder, about), folder / about["base"]["file"]
        found = cls(folder, base, int(about["context"]), models, about["compressed_fingerprint"])
        for path in found.loras.values():
            check_made_for(path, found.fingerprint, base)
        return found

    @property
    def loras(self) -> dict[str, Path]:
        """Every LoRA file that some model needs, each once."""
        files = dict.fromkeys(file for model in self.models.values() for file in model.apply)
        return {file: self.folder / file for file in files}

    def __getitem__(self, name: str) -> Model:
        """A model; raises `NoSuchModel`."""
        if name not in self.models:
            raise NoSuchModel(f"The model {name!r:.100} is not served here; these are: {', '.join(self.models)}")
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
        always = self.models[BASE_NAME].apply if entries["recovery"] == "beside" else ()
        return Model(name, (*always, str(file)), Task.from_json(json.loads(entries["task"])))


def _models(folder: Path, about: Mapping[str, Any]) -> dict[str, Model]:
    """What manifest.json says of them."""
    if not about["base"]:
        raise CaloraError(folder, "base.gguf", "an export without it", "export it with --kind gguf")
    models = {BASE_NAME: Model(BASE_NAME, tuple(about["base"]["apply"]))}
    for name, entry in about["adapters"].items():
        if name == BASE_NAME:
            fix = "export it under another name: NAME=FOLDER"
            raise CaloraError(f"{folder}, adapters", f"names other than '{BASE_NAME}'", name, fix)
        models[name] = Model(name, tuple(entry["apply"]), Task.from_json(entry["task"]))
    for file in (file for model in models.values() for file in model.apply):
        if file not in about["files"]:
            raise CaloraError(folder, "LoRAs that manifest.json lists", file, "export it again")
    return models
