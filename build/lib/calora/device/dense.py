"""A compressed model as a plain folder of transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from calora.common.files import write_json
from calora.common.tensors import write_tensors
from calora.errors import CaloraError
from calora.layers.experts import ExpertLinear, Experts
from calora.layers.layout import dense_weight, own_weight
from calora.recovery.shared import CHILD
from calora.saving import CARRIED


def dtype_of(model: PreTrainedModel) -> torch.dtype:
    """The dtype that a model is stored in, by its configuration."""
    dtype = model.config.dtype
    assert isinstance(dtype, torch.dtype)
    return dtype


def write_dense(directory: Path, model: PreTrainedModel, source: Path, merged: bool) -> None:
    """A plain folder of transformers with the values of a compressed model.

    Args:
        model: in its stored form.
        source: its folder, for configuration and tokenizer.
        merged: with the recovery of the base in the weights.

    Raises:
        CaloraError: it has experts, which transformers' class has not.
    """
    tensors: dict[str, Tensor] = {}
    tied = model.get_output_embeddings() if model.config.tie_word_embeddings else None
    dtype = dtype_of(model)
    for path, module in model.named_modules():
        if isinstance(module, Experts | ExpertLinear):
            found, fix = "experts", "compress without `moefy`"
            raise CaloraError(f"export to dense, {path}", "layers of transformers' own class", found, fix)
        if module is tied or path.rpartition(".")[2] == CHILD:
            continue
        matrix = isinstance(module, nn.Linear | nn.Embedding)
        if matrix:
            tensors[f"{path}.weight"] = (dense_weight if merged else own_weight)(module, dtype)
        for part, tensor in module.named_parameters(recurse=False):
            if not (matrix and part == "weight"):
                tensors[f"{path}.{part}"] = tensor.detach()
    write_tensors(directory / "model.safetensors", tensors)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    write_json(directory / "config.json", {key: value for key, value in config.items() if key != "quantization_config"})
    for file in {file for pattern in CARRIED for file in source.glob(pattern)}:
        shutil.copyfile(file, directory / file.name)
