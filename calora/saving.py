"""A compressed model on disk: packed safetensors, compression.json, configuration and tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from calora.common.artifacts import fingerprint, whole_directory, write_json, write_tensors
from calora.formats import quantization_config, stored_as

REPORT = "compression.json"
WEIGHTS, KEPT = "model.safetensors", "kept.safetensors"
VERSION = 2  # of compression.json and of the layers that it describes
SIZES = (
    "d_ff", "intermediate_size", "num_layers", "num_decoder_layers", "num_hidden_layers", "head_dim",
    "num_key_value_heads", "num_attention_heads", "layer_types",
)  # fmt: skip
CARRIED = ("generation_config.json", "*token*", "*.model", "vocab*", "merges*", "chat_template*")


def save(model: PreTrainedModel, report: Mapping[str, Any], directory: Path, base: Path) -> None:
    """Write a compressed model: packed weights, compression.json, configuration and the base's tokenizer.

    Tensors that are shared in memory (tied embeddings) are stored once. What remains of the original's outputs and
    inputs, where some were cut or moved, goes to kept.safetensors.
    """
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    names: dict[int, str] = {}
    for name, tensor in model.state_dict().items():
        first = names.setdefault(tensor.data_ptr(), name) if tensor.numel() else name
        if first == name:
            tensors[name] = tensor
        else:
            tied[name] = first
    told = {**report, "tied": tied}
    kept = told.pop("kept")
    format = quantization_config(told, theirs=not model._keep_in_fp32_modules)
    tensors = stored_as(format, tensors, tied)
    config = json.loads((base / "config.json").read_text(encoding="utf-8")) | sizes(model)
    with whole_directory(directory) as scratch:
        for pattern in CARRIED:
            for file in base.glob(pattern):
                shutil.copyfile(file, scratch / file.name)
        write_json(scratch / "config.json", config | ({"quantization_config": format} if format else {}))
        write_tensors(scratch / WEIGHTS, tensors)
        if kept:
            write_tensors(scratch / KEPT, kept)
        stored = sum(file.stat().st_size for file in scratch.iterdir())
        total = {
            "version": VERSION,
            "bytes_base": sum(file.stat().st_size for file in base.iterdir() if file.is_file()),
            "bytes_without_this_report": stored,
            "base_fingerprint": fingerprint(base),
            "fingerprint": fingerprint(scratch),
        }
        write_json(scratch / REPORT, {**total, **told})


def sizes(model: PreTrainedModel) -> dict[str, Any]:
    """The entries of config.json that a smaller model of the same kind needs."""
    config = model.config.to_dict()
    return {name: config[name] for name in SIZES if name in config}
