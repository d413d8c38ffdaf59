"""A compressed model on disk: packed safetensors, compression.json, configuration and tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from calora.common.files import fingerprint, whole_directory, write_json
from calora.common.tensors import each_once, write_pieces, write_tensors
from calora.errors import CaloraError
from calora.formats import quantization_config, stored_as
from calora.layers.experts import ExpertLinear, Experts
from calora.layers.layout import prepared, store
from calora.layers.nf4 import Nf4Linear
from calora.layers.packed import PackedEmbedding, PackedLinear
from calora.layers.report import Report
from calora.models.anatomy import sizes
from calora.models.blocks import blocks_of
from calora.models.uniform import was_conv1d

REPORT = "compression.json"
WEIGHTS, KEPT = "model.safetensors", "kept.safetensors"
VERSION = 3  # of compression.json and of the layers that it describes
CARRIED = ("generation_config.json", "*token*", "*.model", "vocab*", "merges*", "chat_template*")


def save(model: PreTrainedModel, report: Report, directory: Path, base: Path) -> None:
    """Write a compressed model: packed weights, compression.json, configuration and the base's tokenizer.

    Tensors that are shared in memory (tied embeddings) are stored once; the blocks of a streamed model are read one after
    another, from where `compress` put them. What remains of the original's outputs and
    inputs, where some were cut or moved, goes to kept.safetensors.

    Raises:
        CaloraError: the report is not that of the model, or the model was prepared to compute.
    """
    check_stored_form(model, report)
    tensors, tied = each_once(model.state_dict())
    told = {**report.to_json(), "layers": dict(report.layers), "tied": tied}
    turned = was_conv1d(model)
    theirs = not model._keep_in_fp32_modules and not turned and covers(model, report)
    format = quantization_config(told, theirs)
    tensors = stored_as(format, tensors, tied)
    conv1d = {f"{layer}.weight" for layer in as_conv1d(turned, told["layers"], plain=format is None)}
    tensors = transposed(tensors, conv1d)
    config = json.loads((base / "config.json").read_text(encoding="utf-8")) | sizes(model)
    config.pop("torch_dtype", None)  # as transformers 4 called it
    config["dtype"] = str(model.dtype).removeprefix("torch.")  # what is stored, whatever the base came in
    with whole_directory(directory) as scratch:
        for pattern in CARRIED:
            for file in base.glob(pattern):
                shutil.copyfile(file, scratch / file.name)
        write_json(scratch / "config.json", config | ({"quantization_config": format} if format else {}))
        pieces = (transposed(stored_as(format, piece, {}), conv1d) for piece in blocks_of(model).states())
        write_pieces(scratch / WEIGHTS, tensors, pieces)
        if report.kept:
            write_tensors(scratch / KEPT, report.kept)
        stored = sum(file.stat().st_size for file in scratch.iterdir())
        total = {
            "version": VERSION,
            "bytes_base": sum(file.stat().st_size for file in base.iterdir() if file.is_file()),
            "bytes_without_this_report": stored,
            "base_fingerprint": fingerprint(base),
            "fingerprint": fingerprint(scratch),
        }
        write_json(scratch / REPORT, {**total, **told})


def transposed(tensors: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """The tensors, those of `names` transposed."""
    return {name: tensor.T.contiguous() if name in names else tensor for name, tensor in tensors.items()}


def as_conv1d(turned: Sequence[str], layers: dict[str, dict[str, Any]], plain: bool) -> list[str]:
    """The layers that are stored as the base's own Conv1D, [in, out]; the entry of one that changed then says so.

    Args:
        turned: the layers that transformers has as Conv1D.
        layers: the entries of the report.
        plain: whether transformers alone reads the model; if not, layers that changed are linear layers there too.
    """
    if plain:
        for layer in layers.keys() & set(turned):
            layers[layer] = {**layers[layer], "conv1d": True}
        return list(turned)
    return [layer for layer in turned if layer not in layers]


def check_stored_form(model: PreTrainedModel, report: Report) -> None:
    """Raise unless each packed layer is as the report describes it: one that was prepared to compute has another form."""
    for name, layer in model.named_modules():
        if isinstance(layer, PackedLinear | PackedEmbedding | Nf4Linear | ExpertLinear | Experts):
            entry = report.layers.get(name, {})
            if prepared(layer) or any(entry.get(key) != value for key, value in store(layer)[0].items()):
                fix = "save what `compress` returned, without adapters; copy the folder of a model that was loaded"
                raise CaloraError(f"save, {name}", "the form that its report describes", "another one", fix)


def covers(model: PreTrainedModel, report: Report) -> bool:
    """Whether every linear layer but the head was compressed: the formats of the ecosystem take all of them for it."""
    head = model.get_output_embeddings()
    layers = {name for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and layer is not head}
    return layers <= report.layers.keys()
