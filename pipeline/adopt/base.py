"""Look at a base: a folder, a GGUF file, or a model of the hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from calora.common.files import check_tensors, fingerprint, sha256
from calora.errors import CaloraError
from pipeline.adopt.wanted import Entry, HubId, Said, asked, hub_id, million, shown
from stages.base import WANTED
from stages.common import BASE

if TYPE_CHECKING:
    from calora.preview.outline import Outline


@dataclass(frozen=True)
class Base:
    """The entry of params.yaml, and the model without its weights."""

    entry: Entry
    outline: Outline


def look(text: str, said: Said) -> Base:
    """What `--base` names.

    Raises:
        CaloraError: it is no base that calora compresses.
    """
    path = Path(text).expanduser()
    if path.is_dir():
        found = _folder(path)
    elif path.is_file():
        found = _gguf(path)
    else:
        found = _of_hub(hub_id(text, "model", "--base"))
    describe(text, found.outline, said)
    return found


def _folder(path: Path) -> Base:
    from calora.preview.outline import outline

    files = sorted(path.glob("*.safetensors"))
    if not files and len(ggufs := sorted(path.glob("*.gguf"))) == 1:
        return _gguf(ggufs[0])
    for file in files or [path / "model.safetensors"]:
        check_tensors(file, "name a folder that holds safetensors")
    made = outline(path)
    return Base({"source": "path", "path": shown(path), "sha256": fingerprint(path)}, made)


def _gguf(path: Path) -> Base:
    from calora.preview.outline import outline

    if path.suffix != ".gguf":
        raise CaloraError("--base", "a model folder, a GGUF file or a hub id", f"a file, {path}", "name its folder")
    made = outline(path)
    return Base({"source": "path", "path": shown(path), "sha256": sha256(path)}, made)


def _of_hub(found: HubId) -> Base:
    """Its configuration and tokenizer are fetched; the fingerprint follows from what the hub says of its files."""
    from calora.preview.outline import outline

    where = f"--base {found.repo}"
    made = outline(_fetched(where, found, *(pattern for pattern in WANTED if pattern != "*.safetensors")))
    entry = {"source": "hub", "repo": found.repo, "revision": found.revision}
    return Base({**entry, "sha256": _hub_fingerprint(where, found)}, made)


def _fetched(where: str, found: HubId, *patterns: str) -> Path:
    """The files of a repository that fit, in the hub client's cache."""
    from huggingface_hub import snapshot_download

    wanted = list(patterns)
    return Path(asked(where, lambda: snapshot_download(found.repo, revision=found.revision, allow_patterns=wanted)))


def _hub_fingerprint(where: str, found: HubId) -> str:
    """`fingerprint` of the weights, without fetching them where the hub names the SHA-256 of each."""
    import hashlib

    from huggingface_hub import HfApi

    info = asked(where, lambda: HfApi().model_info(found.repo, revision=found.revision, files_metadata=True))
    files = [
        file for file in info.siblings or [] if file.rfilename.endswith(".safetensors") and "/" not in file.rfilename
    ]
    if not files:
        raise CaloraError(
            where, "weights in safetensors", "none", "name a repository that has them, or a GGUF file here"
        )
    if not all(file.lfs for file in files):
        return fingerprint(_fetched(where, found, "*.safetensors"))
    sums = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.rfilename):
        assert file.lfs
        sums.update(f"{file.rfilename}\0{file.lfs.sha256}\n".encode())
    return sums.hexdigest()


def present(entry: Entry) -> Base | None:
    """The base that params.yaml has, if it is on this machine: in models/base, or the folder that it names."""
    from calora.preview.outline import outline

    weights = sorted(BASE.glob("*.safetensors"))
    known = entry["source"] == "pypi" or str(entry.get("path", "")).endswith(".gguf")
    if weights and (known or fingerprint(BASE) == entry["sha256"]):
        return Base(entry, outline(BASE))
    path = Path(str(entry.get("path", "")))
    return Base(entry, outline(path)) if entry["source"] == "path" and path.exists() else None


def describe(title: str, made: Outline, said: Said) -> None:
    """What the command tells of a base."""
    reads = f"reads {made.reads} tokens" if made.reads else "reads texts of any length"
    said.add(
        "base",
        title,
        f"{type(made.model).__name__}, {made.kind}, {made.blocks} blocks of width {made.width}, {million(made.parameters)}"
        f" parameters ({made.parameters * 2 / 1e6:.0f} MB in bf16)",
        f"linear layers: {', '.join(made.parts)}",
        f"vocabulary {made.vocabulary}, {reads}, {'has a' if made.chat else 'no'} chat template",
    )
