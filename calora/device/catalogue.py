"""Which models an exported folder has: its base and its adapters, each with the LoRAs that have to be on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calora.device.folder import check_pair, is_compressed, read_folder
from calora.errors import CaloraError
from calora.models.tasks import Task

BASE_NAME = "base"  # as a model


class NoSuchModel(Exception):
    """None of that name is served."""

    def __init__(self, name: str, known: Iterable[str]) -> None:
        super().__init__(f"The model {name!r:.100} is not served here; these are: {', '.join(known)}")


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
        models: by name, the base first.
        fingerprint: of the uncompressed base.
        compressed: whether this one is another.
    """

    folder: Path
    base: Path
    context: int
    models: Mapping[str, Model]
    fingerprint: str = ""
    compressed: bool = True

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
        models = {BASE_NAME: _model(folder, about, BASE_NAME, about["base"])}
        for name, entry in about["adapters"].items():
            if name == BASE_NAME:
                fix = "export it under another name: NAME=FOLDER"
                raise CaloraError(f"{folder}, adapters", f"names other than '{BASE_NAME}'", name, fix)
            models[name] = _model(folder, about, name, entry)
        base, fingerprint = folder / about["base"]["file"], about["base_fingerprint"]
        found = cls(folder, base, int(about["context"]), models, fingerprint, is_compressed(about))
        for path in found.loras.values():
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
            raise NoSuchModel(name, self.models)
        return self.models[name]


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
