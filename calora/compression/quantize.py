"""Quantisation of linear layers (int8, int4, nf4; rounding to nearest or by GPTQ) and of the embeddings (int8)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from calora.compression.gptq import gptq
from calora.compression.options import FIX, Plan, one_of
from calora.compression.walk import Block, Change
from calora.errors import CaloraError
from calora.layers.codes import fit_grid, nearest_rows
from calora.layers.layout import dense_weight
from calora.layers.nf4 import Nf4Linear
from calora.layers.packed import BITS, PackedEmbedding, PackedLinear, Packing, factor_of
from calora.models.anatomy import linear_layers

GROUPS = (32, 64, 128)


@dataclass(frozen=True)
class Options:
    """Options of `quantize`.

    Args:
        format: `int8` (one symmetric scale an output row), `int4` (a scale a group) or `nf4` (bitsandbytes' own, with
            double quantisation, arXiv 2305.14314).
        rounding: `nearest`, or `gptq` (arXiv 2210.17323): the error of a weight is answered by those that follow.
        group: int4: inputs that share a scale, 32, 64 or 128.
        symmetric: int4: whether the grid is symmetric about 0.
        outliers: int8: input columns with some |x| of at least this in calibration stay in the base's dtype
            (arXiv 2208.07339: 6.0); 0 for none.
        embeddings: `int8` or `none`: the input table and the output head, which stay one tensor where they were tied.
    """

    format: str
    rounding: str = "nearest"
    group: int | None = None
    symmetric: bool = True
    outliers: float = 0.0
    embeddings: str = "none"

    def __post_init__(self) -> None:
        one_of("quantize.format", self.format, ("int8", "int4", "nf4"))
        one_of("quantize.rounding", self.rounding, ("nearest",) if self.format == "nf4" else ("nearest", "gptq"))
        one_of("quantize.embeddings", self.embeddings, ("int8", "none"))
        one_of("quantize.symmetric", self.symmetric, (True, False) if self.format == "int4" else (True,))
        if self.format == "int4":
            one_of("quantize.group (of int4)", self.group, GROUPS)
        elif self.group is not None:
            raise CaloraError("quantize.group", f"none for {self.format}", self.group, FIX)
        if self.outliers and self.format != "int8":
            raise CaloraError("quantize.outliers", f"none for {self.format}", self.outliers, FIX)
        if not isinstance(self.outliers, int | float) or self.outliers < 0:
            raise CaloraError("quantize.outliers", "a threshold of at least 0", repr(self.outliers), FIX)


def check(model: PreTrainedModel, options: Options) -> None:
    """Raise `CaloraError` if the options do not fit the model's widths or its embeddings."""
    for name, layer in linear_layers(model).items():
        if options.group and layer.in_features % options.group:
            fits = [g for g in GROUPS if layer.in_features % g == 0]
            raise CaloraError(
                "quantize.group",
                f"a divisor of {name}'s {layer.in_features} inputs ({fits or 'none of ours'})",
                options.group,
                FIX,
            )
    if options.embeddings == "int8":
        for name, table in _tables(model).items():
            if type(table) is not nn.Embedding and factor_of(table) is None:
                expected, fix = "plain vectors, or such times embed_scale", "set it to none for this base"
                raise CaloraError(f"quantize.embeddings, {name}", expected, type(table).__name__, fix)


def _tables(model: PreTrainedModel) -> dict[str, nn.Embedding]:
    """Every embedding table that shares the input table's weight."""
    weight = model.get_input_embeddings().weight
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Embedding) and module.weight is weight
    }


def change(block: Block, options: Options, plan: Plan) -> Change:
    """Quantise every linear layer of the block."""
    if options.format == "nf4":
        return Change({name: Nf4Linear.pack(layer, block.dtype) for name, layer in block.layers.items()})
    made = Change()
    for group in block.groups():
        first = next(iter(group))
        made.modules |= _packed(group, block.moments()[first], block.largest()[first], options, block.dtype)
    return made


def finish(model: PreTrainedModel, options: Options, _: Plan) -> list[str]:
    """Quantise the embeddings if asked; the names of the new modules."""
    made = _embeddings(model) if options.embeddings == "int8" else {}
    for name, module in made.items():
        model.set_submodule(name, module)
    return list(made)


def _packed(
    group: dict[str, nn.Linear], moment: Tensor, largest: Tensor, options: Options, dtype: torch.dtype
) -> dict[str, nn.Module]:
    """Layers that read the same input, quantised: GPTQ goes through their columns together.

    Args:
        moment: X^T X [in, in] of that input.
        largest: |x| [in].
    """
    layers = list(group.values())
    weight = torch.cat([dense_weight(layer, torch.float32) for layer in layers])  # [out of all, in]
    patterns = [layer.keep for layer in layers if isinstance(layer, PackedLinear)]
    keep = torch.cat([pattern for pattern in patterns if pattern is not None]) if patterns else None
    outliers = (largest >= options.outliers).nonzero().flatten() if options.outliers else None
    inliers = weight if outliers is None else weight.clone().index_fill_(1, outliers, 0)
    span = options.group or layers[0].in_features
    fit = partial(fit_grid, bits=BITS[options.format], group=span, symmetric=options.symmetric, dtype=dtype)
    if options.rounding == "nearest":
        grid = fit(inliers)
    else:
        rounded, grid = gptq(inliers, moment, fit, span, keep)
        weight = rounded if outliers is None else rounded.index_copy_(1, outliers, weight[:, outliers])
    packing = Packing(
        options.format, keep is not None, span, options.symmetric, 0 if outliers is None else len(outliers)
    )
    packed: dict[str, nn.Module] = {}
    start = 0
    for name, layer in group.items():
        rows = slice(start, start + layer.out_features)
        start = rows.stop
        packed[name] = PackedLinear.pack(
            layer, packing, weight=weight[rows], keep=None if keep is None else keep[rows], grid=grid.of_rows(rows),
            outliers=outliers, dtype=dtype,
        )  # fmt: skip
    return packed


def _embeddings(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Every table and head that shares the input table's weight, and an untied head, in int8."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(table, nn.Embedding)
    packed_table = PackedEmbedding.pack(table)
    packed: dict[str, nn.Module] = {
        name: packed_table if factor_of(own) == packed_table.factor else PackedEmbedding.pack(own)
        for name, own in _tables(model).items()
    }
    for name, module in model.named_modules(remove_duplicate=False):
        if module is head and isinstance(module, nn.Linear):
            packing = Packing("int8", group=module.in_features)
            packed_head = PackedLinear(module.in_features, module.out_features, packing, module.weight.dtype)
            tied = module.weight is table.weight
            codes, scale = (packed_table.weight, packed_table.weight_scale) if tied else nearest_rows(module.weight)
            bias = {} if module.bias is None else {"bias": module.bias.detach()}
            packed_head.restore({"weight": codes, "weight_scale": scale, **bias})
            if tied:
                packed_head.weight = packed_table.weight  # one parameter, also when moved
            packed[name] = packed_head
    return packed
