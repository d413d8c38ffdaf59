"""Checkpoints that other packages have compressed already, read as they are: codes, scales, and what is plain.

GPTQ, AWQ, compressed-tensors, bitsandbytes and torchao in safetensors, and GGUF. No package is needed but for nf4 and fp4
(bitsandbytes), torchao's rarer tensors (torchao) and GGUF (gguf).
"""

from __future__ import annotations

from pathlib import Path

from calora.errors import CaloraError
from calora.taken.checkpoint import Checkpoint, Folder
from calora.taken.gguf import Gguf


def is_checkpoint(path: Path) -> bool:
    """Whether a path is of weights that others have compressed: a GGUF file, or a folder whose config.json says so."""
    return path.suffix == ".gguf" or Folder.is_quantised(path)


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint of a folder or a GGUF file; only its names and sizes are read.

    Raises:
        CaloraError: it is not there, not compressed, or compressed in a way that is not read here.
    """
    if not path.exists():
        raise CaloraError(path, "a compressed checkpoint", "no such file or folder", "check the path")
    if path.suffix == ".gguf":
        return Gguf(path)
    return Folder(path)
