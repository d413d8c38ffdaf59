"""Quantisation of linear layers (int8 per output row, or bitsandbytes' nf4) and of the embeddings (int8)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from calora.calibrate import linear_layers
from calora.compression.nf4 import pack_nf4
from calora.errors import CaloraError
from calora.packed import PackedEmbedding, PackedLinear
from calora.tasks import Example

LINEAR = ("int8", "nf4")
EMBEDDINGS = ("int8", "none")


def quantize(model: PreTrainedModel, options: dict[str, Any], calibration: Sequence[Example]) -> dict[str, nn.Module]:
    """Quantise every linear layer of the blocks, and the embeddings if asked; returns the new layers by name.

    Options: `format` = `int8` (per output row, symmetric) or `nf4` (bitsandbytes, double quantisation);
    `embeddings` = `int8` or `none`: the input table and the output head, which stay one tensor where they were tied.

    Raises:
        CaloraError: an option is unknown, or the layer is already quantised, or nf4 follows pruning.
    """
    format, embeddings = options.get("format"), options.get("embeddings", "none")
    if set(options) - {"format", "embeddings"} or format not in LINEAR or embeddings not in EMBEDDINGS:
        expected = f"format: one of {', '.join(LINEAR)}; embeddings: one of {', '.join(EMBEDDINGS)}"
        raise CaloraError("quantize", expected, options, "mend the recipe")
    packed: dict[str, nn.Module] = {}
    for name, layer in linear_layers(model).items():
        if type(layer) is nn.Linear:
            packed[name] = PackedLinear.pack(layer, None, "int8") if format == "int8" else pack_nf4(layer)
        elif isinstance(layer, PackedLinear) and layer.format == "native" and format == "int8":
            packed[name] = layer.quantize()
        else:
            raise CaloraError(
                f"quantize {name} to {format}",
                "a layer that is not quantised yet (nf4: a dense one)",
                f"a {layer.extra_repr()} layer",
                "leave out one step, or use int8 after pruning",
            )
    return packed | (_embeddings(model) if embeddings == "int8" else {})


def _embeddings(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Every table and head that shares the input table's weight, and an untied head, in int8."""
    table = model.get_input_embeddings()
    head = model.get_output_embeddings()
    if not isinstance(table, nn.Embedding) or isinstance(table, PackedEmbedding):
        raise CaloraError("quantize embeddings", "a dense table", type(table).__name__, "quantise them once")
    packed_table = PackedEmbedding.pack(table)
    packed: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Embedding) and module.weight is table.weight:
            packed[name] = packed_table
        elif module is head and isinstance(module, nn.Linear):
            packed[name] = PackedLinear.pack(module, None, "int8")
            if module.weight is table.weight:
                packed[name].weight = packed_table.weight
                packed[name].scale = packed_table.scale
    return packed
