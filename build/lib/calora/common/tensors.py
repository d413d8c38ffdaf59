"""Tensors on disk: safetensors only, written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from calora.common.files import check_tensors


def each_once(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, each of those that share memory under its first name alone; other name -> first name)."""
    kept: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    names: dict[int, str] = {}
    for name, tensor in tensors.items():
        first = names.setdefault(same_memory(tensor), name) if tensor.numel() else name
        if first == name:
            kept[name] = tensor
        else:
            tied[name] = first
    return kept, tied


def same_memory(tensor: Tensor) -> int:
    """A number that tensors of the same memory have in common; on the meta device, of the same storage."""
    return tensor.data_ptr() or tensor.untyped_storage()._cdata


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


def write_pieces(path: Path, whole: Mapping[str, Tensor], pieces: Iterable[Mapping[str, Tensor]]) -> None:
    """Write tensors that are never in memory together, whole or not at all; the same bytes as `write_tensors` writes.

    Args:
        whole: name -> a tensor of the shape and dtype of what is written; it may be on the meta device.
        pieces: the values, each name of `whole` in one of them; others are left out.
    """
    header, starts = _header(whole)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.partial")
    try:
        with scratch.open("wb") as file:
            file.write(header)
            for piece in pieces:
                for name in piece.keys() & starts.keys():
                    file.seek(len(header) + starts.pop(name))
                    file.write(piece[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            assert not starts, f"no values for {', '.join(starts)}"
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def _header(tensors: Mapping[str, Tensor]) -> tuple[bytes, dict[str, int]]:
    """The header of a safetensors file, and where behind it each tensor starts; safetensors itself says in which order."""
    empty = {name: torch.empty(0, dtype=tensor.dtype) for name, tensor in tensors.items()}
    plain = save(empty, metadata={"format": "pt"})
    entries: dict[str, dict[str, Any]] = json.loads(plain[8 : 8 + int.from_bytes(plain[:8], "little")])
    starts, end = {}, 0
    for name, entry in entries.items():
        if name in tensors:
            starts[name], end = end, end + tensors[name].nbytes
            entry |= {"shape": list(tensors[name].shape), "data_offsets": [starts[name], end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, starts


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
