"""Look at the checkpoints of own/ that recipes take. Writes models/taken/<recipe>.json: the hash of each of its files.

A stage of its own, so that a changed file compresses that recipe anew, and other changes in own/ compress nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from calora.common.files import sha256, whole_directory, write_json
from calora.errors import CaloraError
from stages.common import TAKEN, run
from stages.config import Params
from stages.files import own_path

READ = ("*.safetensors", "*.json", "*.gguf")  # of a folder


def main(params: Params) -> None:
    """One file for each recipe of this run; of one that takes nothing it says so."""
    with whole_directory(TAKEN) as scratch:
        for recipe in params.recipes:
            write_json(scratch / f"{recipe}.json", {"files": files_of(params.compressions[recipe], recipe)})


def files_of(steps: Any, recipe: str) -> dict[str, str]:
    """File -> SHA-256, of what a recipe takes; none of one that takes nothing.

    Raises:
        CaloraError: it is not in own/, or holds no weights.
    """
    found: dict[str, str] = {}
    for step in steps if isinstance(steps, list) else ():
        options = step.get("take") if isinstance(step, Mapping) else None
        if isinstance(options, Mapping) and isinstance(options.get("path"), str):
            found |= hashes(own_path(options["path"], f"compress.{recipe}, take.path"))
    return found


def hashes(path: Path) -> dict[str, str]:
    """File -> SHA-256, of a checkpoint.

    Raises:
        CaloraError: it holds no weights.
    """
    files = [path] if path.is_file() else sorted(file for kind in READ for file in path.glob(kind))
    if not any(file.suffix in (".safetensors", ".gguf") for file in files):
        raise CaloraError(
            path, "a folder with safetensors, or a GGUF file", "no weights", "name the checkpoint's folder"
        )
    return {file.as_posix(): sha256(file) for file in files}


if __name__ == "__main__":
    run(main)
