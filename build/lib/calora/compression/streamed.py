"""A model whose blocks are in memory one at a time: for a base that is larger than memory.

What stands outside of the blocks (embeddings, head, norms) is in memory. A block is read from safetensors, sharded or not, when it
is needed; afterwards placeholders on the meta device keep its shapes, dtypes, and which tensors are one. A block that is
finished is read from the checkpoint from then on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from calora.common.files import check_tensors
from calora.common.memory import give_back
from calora.common.tensors import same_memory, stored_tensors
from calora.compression.finished import take
from calora.errors import CaloraError
from calora.layers.precision import dense_tensors
from calora.models.anatomy import stacks
from calora.models.blocks import Blocks
from calora.models.loading import attention_of, model_class
from calora.models.uniform import conv1d_layers, keep_dtype

GENERATION = "generation_config.json"
FIX = "open it with `load_model`, where memory holds it; or save it anew with the transformers that is installed"


class Streamed(Blocks):
    """The blocks of a model that `open_streamed` made.

    Args:
        files: name of a tensor -> the file that holds it.
        dtype: in which the model is opened.
        device: where blocks are put.
    """

    def __init__(
        self, model: PreTrainedModel, files: Mapping[str, Path], dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(model)
        self.files, self.dtype, self.device = files, dtype, device
        self.names = [f"{stack}.{index}" for stack, blocks in stacks(model).items() for index in range(len(blocks))]
        self.finished: dict[str, Path] = {}

    def values(self, names: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
        """The base's tensors of these names, each in a dtype."""
        found = {}
        for path in sorted({self.files[name] for name in names}):
            with stored_tensors(path) as tensors:
                for name, dtype in names.items():
                    if self.files[name] == path:  # by way of the model's dtype: what is computed in is wider
                        tensor = tensors[name]
                        tensor = tensor.to(self.dtype) if tensor.is_floating_point() else tensor
                        found[name] = tensor.to(self.device, dtype)
        return found

    def read(self, name: str) -> None:
        """Bring a block into memory, in the dtypes of its placeholders."""
        block = self.model.get_submodule(name)
        dtypes = {key: tensor.dtype for key, tensor in dense_tensors(block)}
        if name in self.finished:
            take(self.finished[name], self.model)
            for key, tensor in dense_tensors(block):
                if not tensor.is_meta and key in dtypes:  # those of the base are read below
                    tensor.data = tensor.data.to(dtypes[key])
        missing = {key: tensor.dtype for key, tensor in block.state_dict().items() if tensor.is_meta}
        values = self.values({f"{name}.{key}": dtype for key, dtype in missing.items()})
        fill(block, {key: values[f"{name}.{key}"] for key in missing})

    @contextmanager
    def present(self, name: str) -> Iterator[None]:
        """The block called `name` is in memory meanwhile."""
        self.read(name)
        try:
            yield
        finally:
            empty(self.model.get_submodule(name))
            give_back()

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Each block is in memory while it computes."""
        handles = []
        for name in self.names:
            block = self.model.get_submodule(name)
            handles += [
                block.register_forward_pre_hook(lambda *_, name=name: self.read(name), prepend=True),
                block.register_forward_hook(lambda block, *_: empty(block)),
            ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def finish(self, name: str, path: Path | None) -> None:
        """From now on the block is what `path` says."""
        if path:
            self.finished[name] = path
        empty(self.model.get_submodule(name))

    def states(self) -> Iterator[dict[str, Tensor]]:
        """What is outside of the blocks, then each block."""
        yield {name: tensor for name, tensor in self.model.state_dict().items() if not tensor.is_meta}
        for name in self.names:
            with self.present(name):
                yield self.model.get_submodule(name).state_dict(prefix=f"{name}.")


def open_streamed(directory: Path, dtype: torch.dtype, device: str | torch.device = "cpu") -> PreTrainedModel:
    """An uncompressed model from a local folder of safetensors, whose blocks stay on disk; frozen, for `compress` alone.

    Args:
        dtype: in which it will be stored.

    Raises:
        CaloraError: a file is missing or broken, or its tensors are not called as the model's are, or its layers are
            Conv1D.
    """
    files = tensor_files(directory)
    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    cls: Any = model_class(config, directory)
    with init_empty_weights(include_buffers=False):
        model = cls._from_config(config, dtype=dtype, attn_implementation=attention_of("sdpa"))
    if model._keep_in_fp32_modules_strict and dtype != torch.float32:
        raise CaloraError(directory, "one dtype for all weights", f"some in fp32 in {cls.__name__}", FIX)
    if conv1d_layers(model):
        raise CaloraError(directory, "linear layers", f"Conv1D in {cls.__name__}", FIX)
    keep_dtype(model)
    blocks = Streamed(model, files, dtype, torch.device(device))
    inside = tuple(f"{name}." for name in blocks.names)
    state = model.state_dict()
    absent = [name for name in state if name.startswith(inside) and name not in files]
    here = {name: tensor.dtype for name, tensor in state.items() if name in files and not name.startswith(inside)}
    model.load_state_dict(blocks.values(here), strict=False, assign=True)
    model.tie_weights()
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = buffer if buffer is None else buffer.to(device)
    absent += [name for name, tensor in model.state_dict().items() if tensor.is_meta and not name.startswith(inside)]
    if absent:
        raise CaloraError(directory, f"a tensor called {absent[0]}", "none", FIX)
    if (directory / GENERATION).exists():
        model.generation_config = GenerationConfig.from_pretrained(directory, local_files_only=True)
    model.calora_blocks = blocks
    opened: PreTrainedModel = model.eval().requires_grad_(False)
    return opened


def tensor_files(directory: Path) -> dict[str, Path]:
    """Name of each tensor -> the safetensors file of a model folder that holds it."""
    files: dict[str, Path] = {}
    for path in sorted(directory.glob("*.safetensors")) or [directory / "model.safetensors"]:
        check_tensors(path, "make it again, or name a folder that holds safetensors")
        with stored_tensors(path) as tensors:
            files |= dict.fromkeys(tensors, path)
    return files


def fill(block: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Put tensors in the place of placeholders; the modules stay, with their hooks."""
    for key, value in values.items():
        path, _, name = key.rpartition(".")
        module = block.get_submodule(path)
        if name in module._parameters:
            module._parameters[name] = nn.Parameter(value, requires_grad=False)
        else:
            module._buffers[name] = value


def empty(block: nn.Module) -> None:
    """Give up the tensors of a block that can be read again; those that share memory get one placeholder."""
    placeholders: dict[int, Tensor] = {}

    def placeholder(tensor: Tensor) -> Tensor:
        return placeholders.setdefault(same_memory(tensor), torch.empty_like(tensor, device="meta"))

    for module in block.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(placeholder(parameter.detach()), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                module._buffers[name] = placeholder(buffer)
