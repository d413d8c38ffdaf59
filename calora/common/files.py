"""Artifacts on disk: written whole or not at all, recognised by their SHA-256. Nothing here imports torch."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from calora.errors import CaloraError

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


@contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """Yield a scratch directory that becomes `target` only if the block ends without an error.

    An earlier `target` is replaced; after an error or a kill it is still there, untouched.
    """
    _bring_back(target)
    scratch = target.with_name(f".{target.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    replace_directory(scratch, target)


@contextmanager
def locked(file: Path, wait: bool = True) -> Iterator[bool]:
    """Whether the lock `file` is ours until the end, always so where we wait; the system drops a dead process's lock."""
    lock = FileLock(file, thread_local=False)
    try:
        lock.acquire(blocking=wait)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        with suppress(OSError):  # before it is free: who waits for it looks whether it is still there
            os.unlink(file)
        lock.release()


@contextmanager
def alone(target: Path) -> Iterator[None]:
    """Wait until no other process that asks for this writes `target`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target.with_name(f".{target.name}.lock")):
        yield


@contextmanager
def extended_directory(target: Path, last: str) -> Iterator[Path]:
    """Yield a scratch directory with the files of `target`; what is new there is moved to it if the block ends without an error.

    The file `last` is moved last, and says what is there: until then, and after an error or a kill, `target` is what it was.
    In the block files may be added, or replaced under a temporary name, and not be written to: they are shared.
    """
    scratch = target.with_name(f".{target.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(target, scratch, copy_function=_link)
    before = _stamps(scratch)
    try:
        yield scratch
        new = [file for file, stamp in _stamps(scratch).items() if stamp != before.get(file)]
        for file in sorted(new, key=lambda file: file == Path(last)):
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            os.replace(scratch / file, target / file)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _stamps(folder: Path) -> dict[Path, tuple[int, int]]:
    """By which another file of that name is told: when it was written, and where it is."""
    found = ((path.relative_to(folder), path.stat()) for path in folder.rglob("*") if path.is_file())
    return {file: (about.st_mtime_ns, about.st_ino) for file, about in found}


def _link(source: str, copy: str) -> None:
    try:
        os.link(source, copy)
    except OSError:  # such as a file system that has none
        shutil.copy2(source, copy)


def replace_directory(scratch: Path, target: Path) -> None:
    """Rename the finished folder `scratch` to `target`; what stood there is removed last, so that a kill leaves one."""
    _bring_back(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = _aside(target)
    if target.exists():
        shutil.rmtree(aside, ignore_errors=True)
        target.rename(aside)
    scratch.rename(target)
    shutil.rmtree(aside, ignore_errors=True)


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.replaced")


def _bring_back(target: Path) -> None:
    """After a kill between the two renames."""
    aside = _aside(target)
    if aside.exists() and not target.exists():
        aside.rename(target)


def write_text(path: Path, text: str) -> None:
    """Write `text` under a temporary name, then rename it to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.partial")
    try:
        scratch.write_text(text, encoding="utf-8")
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, made_by: str) -> dict[str, Any]:
    """Read a JSON object; `made_by` says how to make the file when it is missing."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CaloraError(path, "a JSON file", "no such file", made_by) from None
    except ValueError as error:
        raise CaloraError(path, "valid JSON", error, f"delete it, then {made_by}") from None
    if not isinstance(value, dict):
        raise CaloraError(path, "a JSON object", type(value).__name__, f"delete it, then {made_by}")
    return value


def check_tensors(path: Path, made_by: str) -> None:
    """Raise unless `path` is a readable safetensors file (its header is read, its data is not)."""
    if not path.exists():
        pickles = [p.name for p in sorted(path.parent.glob("*")) if p.suffix in PICKLES]
        if pickles:
            raise CaloraError(
                path, "safetensors", f"only pickles ({', '.join(pickles)})", "convert the weights to safetensors"
            )
        raise CaloraError(path, "a safetensors file", "no such file", made_by)
    try:
        with safe_open(path, framework="pt") as file:
            file.keys()
    except SafetensorError as error:
        found = f"a broken or foreign file of {path.stat().st_size} bytes ({error})"
        raise CaloraError(path, "a whole safetensors file", found, f"delete it, then {made_by}") from None


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(directory: Path) -> str:
    """One SHA-256 over the names and bytes of a model's weights (`*.safetensors`), in name order.

    It identifies the numbers that an adapter was made for, whatever the folder is called.
    """
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise CaloraError(directory, "at least one *.safetensors file", "none", "name the folder of a model")
    whole = hashlib.sha256()
    for file in files:
        whole.update(f"{file.name}\0{sha256(file)}\n".encode())
    return whole.hexdigest()


def digest(*folders: Path, suffixes: tuple[str, ...] = ()) -> str:
    """SHA-256 over the names and bytes of all files below some folders."""
    whole = hashlib.sha256()
    for folder in folders:
        for file in sorted(folder.rglob("*")):
            if file.is_file() and (not suffixes or file.suffix in suffixes):
                whole.update(f"{file.relative_to(folder)}\0{sha256(file)}\n".encode())
    return whole.hexdigest()


def bytes_on_disk(directory: Path) -> int:
    """Sum of the sizes of all files below `directory`, in bytes."""
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
