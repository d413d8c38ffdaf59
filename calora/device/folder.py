"""An exported folder: which files it has, what manifest.json says of them, and opening it.

    manifest.json        what this module describes
    README.md            the card: what is exact, what it scored
    base.gguf            the compressed base, with tokenizer and chat template
    recovery.gguf        a LoRA that belongs to the base, where its recipe has a recovery: on under every adapter and alone
    adapters/NAME.gguf   a LoRA a task
    dense/               the same base as a plain folder of transformers
    peft/NAME/           the same adapters as plain PEFT folders, for dense/

The last two are there with the kind `peft`, the four before with the kind `gguf`. manifest.json:

    version, versions    of this layout; of the libraries
    architecture         llama.cpp's name of it; null without gguf
    context              most tokens that the model reads
    base_fingerprint     of the uncompressed base; compressed_fingerprint: of the compressed one
    recipe               the steps of the compression
    files                relative path -> bytes, sha256; of all files but README.md and manifest.json
    base                 file, types (GGUF type -> tensors), rounded (layer -> was, type, error; empty: all exact), apply
    adapters             NAME -> file, apply, type, peft, task (name, prompt, answers, max_tokens, max_new_tokens),
                         answer_ids (the token of each answer; none where they are of several or a row's own), scores (by kind; see `calora.device.score`)

`apply` are the LoRA files that have to be on, at scale 1, all others off: of the base alone, or for an adapter. Both GGUF
files of a pair have `calora.base_fingerprint` and `calora.compressed_fingerprint` in their metadata.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

from calora.common.files import read_json, sha256
from calora.errors import CaloraError

VERSION = 1
MANIFEST, CARD = "manifest.json", "README.md"
BASE, RECOVERY, ADAPTERS, DENSE, PEFT = "base.gguf", "recovery.gguf", "adapters", "dense", "peft"
FIX = "export it again, or name another folder"


def read_folder(folder: Path, whole: bool = True) -> dict[str, Any]:
    """manifest.json of an exported folder.

    Args:
        whole: look at the SHA-256 of each file too, not only at its size.

    Raises:
        CaloraError: it is no such folder, or a file is missing, truncated or another one.
    """
    path = folder / MANIFEST
    about = read_json(path, FIX)
    if about.get("version") != VERSION:
        raise CaloraError(path, f"version {VERSION}", about.get("version"), f"another calora wrote it: {FIX}")
    for name, entry in about["files"].items():
        inside = PurePosixPath(name)
        if inside.is_absolute() or ".." in inside.parts:
            raise CaloraError(path, "files inside the folder", name, FIX)
        file = folder / name
        size = file.stat().st_size if file.exists() else "no such file"
        if size != entry["bytes"]:
            raise CaloraError(file, f"{entry['bytes']} bytes", size, FIX)
        if whole and (found := sha256(file)) != entry["sha256"]:
            raise CaloraError(file, f"SHA-256 {entry['sha256']}", found, FIX)
    return about


def files_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Relative path -> bytes and SHA-256, of all files below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files
    }
