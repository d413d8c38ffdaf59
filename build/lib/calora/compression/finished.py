"""A finished block on disk: the modules that are new in it, and what became of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from calora.common.tensors import each_once, write_tensors
from calora.layers.layout import restore, store

KEPT = "kept"  # stands where the name of a module does, in the names of `Change.kept`


def keep(
    path: Path, model: PreTrainedModel, modules: Sequence[str], kept: Mapping[str, Tensor], told: Mapping[str, Any]
) -> None:
    """Write the new modules of a block, what is kept of the original's outputs and inputs, and what is told of it."""
    tensors, entries = {f"{KEPT}|{key}": value for key, value in kept.items()}, {}
    for name in modules:
        entries[name], own = store(model.get_submodule(name))
        tensors |= {f"{name}|{key}": value for key, value in own.items()}
    tensors, tied = each_once(tensors)
    write_tensors(path, tensors, {"done": json.dumps({"entries": entries, "tied": tied, **told})})


def take(path: Path, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Put the modules of a finished block in place; what is kept, and what was told."""
    with safe_open(path, framework="pt", device=str(model.device), backend="pread") as file:
        told: dict[str, Any] = json.loads(file.metadata()["done"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a mapping
    tensors |= {other: tensors[first] for other, first in told["tied"].items()}
    own: dict[str, dict[str, Tensor]] = {name: {} for name in [*told["entries"], KEPT]}
    for key, tensor in tensors.items():
        owner, _, part = key.partition("|")
        own[owner][part] = tensor
    for name, entry in told["entries"].items():
        model.set_submodule(name, restore(model.get_submodule(name), entry, own[name]))
    return own[KEPT], told
