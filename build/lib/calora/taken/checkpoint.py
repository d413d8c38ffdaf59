"""A folder of safetensors whose config.json has a `quantization_config`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from calora.common.files import check_tensors, read_json
from calora.errors import CaloraError, first_line
from calora.models.loading import model_class
from calora.taken import ao, awq, bnb, compressed, gptq
from calora.taken.values import Values

INDEX = "model.safetensors.index.json"
METHODS: dict[str, ModuleType] = {
    "gptq": gptq, "awq": awq, "compressed-tensors": compressed, "bitsandbytes": bnb, "torchao": ao,
}  # fmt: skip
UNREAD = ("inv_freq", "masked_bias")  # buffers that some writers store, and no model reads
FIX = "name a checkpoint of these kinds, or make C with a recipe of calora's own steps"


class Checkpoint(ABC):
    """Weights that others have compressed.

    Args:
        path: folder or file.
        method: who compressed them.
        files: what holds the weights.
        empty: a model of the same kind on the meta device: its parameters' names and shapes.
    """

    path: Path
    method: str
    files: list[Path]
    empty: PreTrainedModel

    @property
    def bytes(self) -> int:
        """Size of the weights on disk."""
        return sum(file.stat().st_size for file in self.files)

    @property
    @abstractmethod
    def names(self) -> set[str]:
        """The parameters that it holds, by the names that they have in the model."""

    @abstractmethod
    def values(self, name: str) -> Values:
        """What it holds of a parameter."""

    @abstractmethod
    def bytes_of(self, name: str) -> int:
        """Bytes that a parameter takes in it."""

    def tied(self) -> bool:
        """Whether its head is its table."""
        return bool(self.empty.config.get_text_config().tie_word_embeddings)


class Folder(Checkpoint):
    """safetensors, one file or several.

    Raises:
        CaloraError: not compressed, not by a method that is read here, or with tensors of no layer.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        told = read_json(path / "config.json", "name a folder that holds a model")
        self.settings: dict[str, Any] = told.get("quantization_config") or {}
        self.method = str(self.settings.get("quant_method", "none"))
        where = f"{path / 'config.json'}, quantization_config"
        if self.method not in METHODS:
            known = ", ".join(METHODS)
            raise CaloraError(where, f"a quant_method among {known} (or a GGUF file)", self.method, FIX)
        self.files, self.tensors, self.header = _tensors(path)
        try:
            config = AutoConfig.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise CaloraError(path / "config.json", "a model that transformers knows", first_line(error), FIX) from None
        self.empty = empty_model(config, path)
        self.kinds = ao.kinds_of(self.header) if self.method == "torchao" else {}
        METHODS[self.method].check(self.kinds if self.method == "torchao" else self.settings, where)
        self.parts = self._parts()

    @staticmethod
    def is_quantised(path: Path) -> bool:
        """Whether a folder's config.json has a `quantization_config`."""
        config = path / "config.json"
        return config.exists() and bool(
            read_json(config, "name a folder that holds a model").get("quantization_config")
        )

    def _parts(self) -> dict[str, dict[str, str]]:
        """Module -> last part of a tensor's name -> the name of that tensor."""
        own = set(self.empty.state_dict())
        modules = {name for name, _ in self.empty.named_modules()}
        parts: dict[str, dict[str, str]] = {}
        for name in self.tensors:
            module, part = name, ""
            while module and (module not in modules or not part):
                module, _, last = module.rpartition(".")
                part = f"{last}.{part}".rstrip(".")
            linear = isinstance(self.empty.get_submodule(module), nn.Linear | nn.Embedding)
            known = getattr(METHODS[self.method], "PARTS", ()) if linear else ()
            if name not in own and part not in known and not part.startswith(ao.PREFIX) and part not in UNREAD:
                kind = type(self.empty).__name__
                raise CaloraError(self.path, f"tensors of a {kind}", name, "calora would leave it out: " + FIX)
            parts.setdefault(module, {})[part] = name
        return parts

    @property
    def names(self) -> set[str]:
        """The parameters that it holds."""
        held = {name for name in self.empty.state_dict() if name in self.tensors}
        return held | {f"{module}.weight" for module, parts in self.parts.items() if self._is_coded(module, parts)}

    def _is_coded(self, module: str, parts: Mapping[str, str]) -> bool:
        if self.method == "torchao":
            return f"{module}.weight" in self.kinds
        if self.method == "bitsandbytes":
            return "SCB" in parts or "weight.absmax" in parts
        return METHODS[self.method].MARK in parts

    def values(self, name: str) -> Values:
        """What it holds of a parameter."""
        module, _, part = name.rpartition(".")
        own = self.parts.get(module, {})
        if part != "weight" or not self._is_coded(module, own):
            return self._tensor(name)
        held = {key: self._tensor(stored) for key, stored in own.items() if key != "bias"}
        out, width = self.empty.get_parameter(name).shape
        try:
            if self.method == "torchao":
                return ao.read(name, held, self.kinds[name], self.header)
            values: Values = METHODS[self.method].read(held, self.settings, (out, width))
        except (KeyError, RuntimeError, StopIteration, ValueError) as error:
            found = f"{', '.join(f'{k} {list(v.shape)}' for k, v in held.items())} ({type(error).__name__}: {error})"
            raise CaloraError(
                f"{self.path}, {module}", f"{self.method}'s layout of [{out}, {width}]", found, FIX
            ) from None
        return values

    def bytes_of(self, name: str) -> int:
        """Bytes that a parameter takes in it."""
        module, _, part = name.rpartition(".")
        own = self.parts.get(module, {})
        stored = [t for key, t in own.items() if key != "bias"] if part == "weight" else [name]
        return sum(self._tensor(one).nbytes for one in stored)

    def _tensor(self, name: str) -> Tensor:
        with safe_open(self.tensors[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor


def _tensors(path: Path) -> tuple[list[Path], dict[str, Path], dict[str, str]]:
    """Files of a folder, in which of them each tensor is, and what their headers say."""
    if (path / INDEX).exists():
        named = read_json(path / INDEX, "name a whole checkpoint")["weight_map"].values()
        files = [path / name for name in sorted(set(named))]
    else:
        files = sorted(path.glob("*.safetensors")) or [path / "model.safetensors"]
    found: dict[str, Path] = {}
    header: dict[str, str] = {}
    for file in files:
        check_tensors(file, "name a whole checkpoint of safetensors")
        with safe_open(file, framework="pt") as opened:
            found |= dict.fromkeys(opened.keys(), file)
            header |= opened.metadata() or {}
    return files, found, header


def empty_model(config: PretrainedConfig, where: Path) -> PreTrainedModel:
    """A model of this configuration on the meta device."""
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    cls: Any = model_class(config, where)
    with torch.device("meta"):
        empty: PreTrainedModel = cls(config)
    return empty


def needs(package: str, where: object, why: str) -> None:
    """Raise `CaloraError` unless a package is there."""
    if find_spec(package) is None:
        raise CaloraError(where, f"the package {package}, {why}", "no such package", f"pip install {package}")
