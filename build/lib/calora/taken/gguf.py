"""A GGUF file, as llama.cpp and its tools write it: transformers reads it, and Q4_0 and Q8_0 are taken as codes.

Q4_0 is int4 and Q8_0 int8, both symmetric with an fp16 scale for each 32 inputs. All other kinds of block (K-quants, and those with
a minimum) are no grid of ours: their values are plain.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from calora.errors import CaloraError, first_line
from calora.models.loading import model_class
from calora.taken.checkpoint import Checkpoint, empty_model, needs
from calora.taken.values import OnGrid, Values, dense_of, grid_of, signed

BITS = {"Q4_0": 4, "Q8_0": 8}
GROUP = 32


class Gguf(Checkpoint):
    """One file.

    Raises:
        CaloraError: the package gguf is missing, or transformers cannot read the file.
    """

    method = "gguf"

    def __init__(self, path: Path) -> None:
        needs("gguf", path, "which reads it")
        self.path, self.files = path, [path]
        try:
            config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
            reader = _gguf().GGUFReader(path)
            self.blocks = {tensor.name: tensor for tensor in reader.tensors}
            self.architecture = str(_legacy().read_field(reader, "general.architecture")[0])
        except Exception as error:  # both raise many kinds for "no GGUF file" and "a kind of model that is not known"
            found = first_line(error)
            raise CaloraError(
                path, "a GGUF file of a model that transformers knows", found, "name another file"
            ) from None
        if not config.architectures:
            mapping: Any = import_module("transformers").MODEL_FOR_CAUSAL_LM_MAPPING
            config.architectures = [mapping[type(config)].__name__]
        self.config = config
        self.empty = empty_model(config, path)
        self.stored = _names(self.empty)
        self._model: PreTrainedModel | None = None

    @property
    def names(self) -> set[str]:
        """The parameters that it holds."""
        return {self.stored[name] for name in self.blocks if name in self.stored}

    def dense(self) -> PreTrainedModel:
        """The model as transformers unpacks it, in bf16; read once."""
        if self._model is None:
            cls: Any = model_class(self.config, self.path)
            options = {"dtype": torch.bfloat16, "local_files_only": True}
            try:
                self._model = cls.from_pretrained(self.path.parent, gguf_file=self.path.name, **options)
            except Exception as error:  # of many kinds: blocks that gguf cannot unpack, names that are not known
                expected = "tensors that transformers and gguf unpack"
                raise CaloraError(self.path, expected, first_line(error), "name another file") from None
        assert self._model is not None
        return self._model

    def values(self, name: str) -> Values:
        """What it holds of a parameter: codes where they are of a grid of ours and unpack to what transformers reads."""
        plain = self.dense().get_parameter(name).detach()
        block = next((self.blocks[key] for key, own in self.stored.items() if own == name and key in self.blocks), None)
        if block is None or block.tensor_type.name not in BITS or plain.ndim != 2:
            return plain
        codes, scale = (self._turned(part, block.name) for part in _codes(block))
        if codes.shape != plain.shape:
            return plain
        values = OnGrid(codes, grid_of(scale, None, BITS[block.tensor_type.name]))
        return values if torch.equal(dense_of(values, torch.bfloat16), plain) else plain

    def _turned(self, rows: Tensor, name: str) -> Tensor:
        """Rows in transformers' order: llama.cpp's rotary embeddings have queries and keys in another one."""
        processors: Any = _legacy().TENSOR_PROCESSORS
        processor = processors.get(self.architecture, _legacy().TensorProcessor)(config=self.config.to_dict())
        return torch.from_numpy(processor.process(rows.numpy(), name).weights.copy())

    def bytes_of(self, name: str) -> int:
        """Bytes that a parameter takes in it."""
        return sum(
            int(self.blocks[key].n_bytes) for key, own in self.stored.items() if own == name and key in self.blocks
        )


def _gguf() -> Any:
    return import_module("gguf")


def _legacy() -> Any:
    """Where transformers keeps its names for the tensors of a GGUF file."""
    return import_module("transformers.modeling_gguf_pytorch_utils")


def _names(empty: PreTrainedModel) -> dict[str, str]:
    """Name in the file -> name in the model."""
    found: dict[str, str] = _legacy().get_gguf_hf_weights_map(empty, _legacy().TensorProcessor())
    return found


def _codes(block: Any) -> tuple[Tensor, Tensor]:
    """int8 codes [out, in] and fp16 scales [out, in / 32] of a tensor in blocks: a scale, then 32 codes."""
    width, out = int(block.shape[0]), int(block.shape[1])
    raw = torch.from_numpy(block.data.copy()).view(torch.uint8).view(out, width // GROUP, -1)
    scale = raw[..., :2].contiguous().view(torch.float16).squeeze(-1)
    if block.tensor_type.name == "Q8_0":
        return raw[..., 2:].contiguous().view(torch.int8).flatten(1), scale
    nibbles = torch.cat([raw[..., 2:] & 15, raw[..., 2:] >> 4], -1)  # the first half of a block in the low ones
    return signed(nibbles, 4).flatten(1), scale
