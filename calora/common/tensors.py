"""Tensors on disk: safetensors only, written whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from calora.common.files import check_tensors


def each_once(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, each of those that share memory under its first name alone; other name -> first name)."""
    kept: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    names: dict[int, str] = {}
    for name, tensor in tensors.items():
        first = names.setdefault(tensor.data_ptr(), name) if tensor.numel() else name
        if first == name:
            kept[name] = tensor
        else:
            tied[name] = first
    return kept, tied


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as safetensors, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.partial")
    try:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            scratch,
            metadata={"format": "pt", **(metadata or {})},
        )
        os.replace(scratch, path)
    except SafetensorError as error:  # safetensors tells of a full disk in words only
        if "os error 28" in str(error) or "No space left" in str(error):
            raise OSError(errno.ENOSPC, "No space left on device", str(path)) from None
        raise
    finally:
        scratch.unlink(missing_ok=True)


def read_tensors(path: Path, made_by: str) -> dict[str, Tensor]:
    """Read a safetensors file; a missing, truncated or pickled one is a `CaloraError`."""
    check_tensors(path, made_by)
    return load_file(path)


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of an open safetensors file, each read (and given memory) when it is asked for."""

    def __init__(self, file: Any) -> None:
        self.file, self.names = file, tuple(file.keys())

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self.file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


@contextmanager
def stored_tensors(path: Path) -> Iterator[StoredTensors]:
    """Open a safetensors file that `check_tensors` found whole; what is not asked for takes no memory."""
    with safe_open(path, framework="pt", backend="pread") as file:
        yield StoredTensors(file)
