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
    base_fingerprint     of the uncompressed base; compressed_fingerprint: of the compressed one, the same where nothing was compressed
    recipe               the steps of the compression; none of an uncompressed base
    recovery             where that of the base is, if it has one: `beside` the adapters, or `inside` each
    files                relative path -> bytes, sha256; of all files but README.md and manifest.json
    base                 file, types (GGUF type -> tensors), rounded (layer -> was, type, error; empty: all exact), apply
    adapters             NAME -> file, apply, type, peft, task (name, prompt, answers, max_tokens, max_new_tokens),
                         method (what made it: calora, clm_inherited, ... as calora.json has it; lora: a plain LoRA),
                         answer_ids (the token of each answer; none where they are of several or a row's own), scores (by kind; see `calora.device.score`)

`apply` are the LoRA files that have to be on, at scale 1, all others off: of the base alone, or for an adapter. Both GGUF
files of a pair have `calora.base_fingerprint` and `calora.compressed_fingerprint` in their metadata, an adapter `calora.task`
and `calora.recovery` too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from calora.common.files import read_json, sha256
from calora.errors import CaloraError

VERSION = 1
MANIFEST, CARD = "manifest.json", "README.md"
BASE, RECOVERY, ADAPTERS, DENSE, PEFT = "base.gguf", "recovery.gguf", "adapters", "dense", "peft"
NAME = "[A-Za-z0-9_-]+"  # of an adapter
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
        check_file(folder / name, entry, whole)
    return about


def check_file(file: Path, entry: Mapping[str, Any], whole: bool = True) -> None:
    """Raise `CaloraError` unless a file is the one that an entry of `files` describes; without `whole` its size is enough."""
    size = file.stat().st_size if file.exists() else "no such file"
    if size != entry["bytes"]:
        raise CaloraError(file, f"{entry['bytes']} bytes", size, FIX)
    if whole and (found := sha256(file)) != entry["sha256"]:
        raise CaloraError(file, f"SHA-256 {entry['sha256']}", found, FIX)


def is_compressed(about: Mapping[str, Any]) -> bool:
    """Whether the base of a manifest.json is another one than the uncompressed base."""
    return bool(about["compressed_fingerprint"] != about["base_fingerprint"])


def files_of(folder: Path, known: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Relative path -> bytes and SHA-256, of all files of an export but manifest.json and README.md; of some it is known."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        name: known.get(name) or {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for name, path in files.items()
        if name not in (MANIFEST, CARD)
    }
