"""Which models an exported folder has: its base and its adapters, each with the LoRAs that have to be on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from calora.device.entries import check_pair
from calora.device.folder import read_folder
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
        models: by name, the base first.
    """

    folder: Path
    base: Path
    context: int
    models: Mapping[str, Model]

    @classmethod
    def read(cls, folder: Path) -> Catalogue:
        """Read and check manifest.json and all files that are served.

        Raises:
            CaloraError: it is no such folder, has no GGUF, a file is missing, truncated or another one, or an adapter is
                for another base.
        """
        about = read_folder(folder)
        if not about["base"]:
            raise CaloraError(folder, "base.gguf", "an export without it", "export it with --kind gguf")
        models = {BASE_NAME: Model(BASE_NAME, tuple(about["base"]["apply"]))}
        for name, entry in about["adapters"].items():
            if name == BASE_NAME:
                fix = "export it under another name: NAME=FOLDER"
                raise CaloraError(f"{folder}, adapters", f"names other than '{BASE_NAME}'", name, fix)
            models[name] = Model(name, tuple(entry["apply"]), Task.from_json(entry["task"]))
        found = cls(folder, folder / about["base"]["file"], int(about["context"]), models)
        for file, path in found.loras.items():
            if file not in about["files"]:
                raise CaloraError(folder, "LoRAs that manifest.json lists", file, "export it again")
            check_pair(found.base, path)
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
