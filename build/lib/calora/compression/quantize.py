"""Quantisation of linear layers (int8 to int2, nf4; rounding to nearest or by GPTQ) and of the embeddings (int8, int4)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from calora.compression.gptq import gptq
from calora.compression.options import FIX, Plan, one_of
from calora.compression.walk import Block, Change
from calora.errors import CaloraError
from calora.layers.codes import fit_grid
from calora.layers.layout import dense_weight
from calora.layers.nf4 import Nf4Linear
from calora.layers.packed import (
    BITS,
    PackedEmbedding,
    PackedLinear,
    Packing,
    factor_of,
    table_packing,
    table_tensors,
)
from calora.models.anatomy import WORDS, linear_layers, words_of, words_of_all

GROUPS = (32, 64, 128)
GROUPED = ("int4", "int3", "int2")  # formats with a scale for each group of inputs


@dataclass(frozen=True)
class Scheme:
    """How the weight of one layer is quantised: its format, and the inputs that share a scale (None: the whole row)."""

    format: str
    group: int | None


@dataclass(frozen=True)
class Options:
    """Options of `quantize`.

    Args:
        format: `int8` (one symmetric scale an output row), `int4`, `int3`, `int2` (a scale a group) or `nf4`
            (bitsandbytes' own, with double quantisation, arXiv 2305.14314).
        rounding: `nearest`, or `gptq` (arXiv 2210.17323): the error of a weight is answered by those that follow.
        group: int4 to int2: inputs that share a scale, 32, 64 or 128.
        symmetric: int4 to int2: whether the grid is symmetric about 0; int2's has no 0 then (arXiv 2502.02631).
        range: int4 to int2: `minmax`, the grid spans the weights of its group, or `search`: the range is shrunk to where
            their rounding error is least, each weighted by the mean square of its input.
        layers: last part of a layer's name, or a word for some layers (`anatomy.WORDS`) -> another format, or {format, group}
            (not nf4). A name comes before a word, and an earlier word before a later one.
        outliers: int8: input columns with some |x| of at least this in calibration stay in the base's dtype
            (arXiv 2208.07339: 6.0); 0 for none.
        embeddings: `int8`, `int4` (asymmetric, searched range, groups of 64 or 32) or `none`: the input table and the
            output head, which stay one tensor where they were tied.
    """

    format: str
    rounding: str = "nearest"
    group: int | None = None
    symmetric: bool = True
    range: str = "minmax"
    layers: Mapping[str, Any] | None = None
    outliers: float = 0.0
    embeddings: str = "none"

    def __post_init__(self) -> None:
        one_of("quantize.format", self.format, (*BITS, "nf4"))
        one_of("quantize.rounding", self.rounding, ("nearest",) if self.format == "nf4" else ("nearest", "gptq"))
        one_of("quantize.embeddings", self.embeddings, ("int8", "int4", "none"))
        schemes = [("quantize", Scheme(self.format, self.group)), *self._named()]
        for where, scheme in schemes:
            if scheme.format in GROUPED:
                one_of(f"{where}.group (of {scheme.format})", scheme.group, GROUPS)
        grouped = any(scheme.format in GROUPED for _, scheme in schemes)
        one_of("quantize.symmetric", self.symmetric, (True, False) if grouped else (True,))
        one_of("quantize.range", self.range, ("minmax", "search") if grouped else ("minmax",))
        if self.group is not None and not grouped:
            raise CaloraError("quantize.group", f"none for {self.format}", self.group, FIX)
        if self.outliers and self.format != "int8":
            raise CaloraError("quantize.outliers", f"none for {self.format}", self.outliers, FIX)
        if not isinstance(self.outliers, int | float) or self.outliers < 0:
            raise CaloraError("quantize.outliers", "a threshold of at least 0", repr(self.outliers), FIX)

    def scheme(self, layer: str, words: Collection[str]) -> Scheme:
        """How the layer of this name is quantised, which answers to these words."""
        part, layers = layer.rpartition(".")[2], self.layers or {}
        key = part if part in layers else next((word for word in layers if word in words), None)
        if key is None:
            return Scheme(self.format, self.group if self.format in GROUPED else None)
        return self._given(f"quantize.layers.{key}", layers[key])

    def _named(self) -> list[tuple[str, Scheme]]:
        """Where a format of its own is asked for, and which."""
        if self.layers is None:
            return []
        if not isinstance(self.layers, Mapping) or self.format == "nf4":
            expected = "none for nf4" if self.format == "nf4" else "names of layers with their formats"
            raise CaloraError("quantize.layers", expected, self.layers, FIX)
        return [
            (f"quantize.layers.{part}", self._given(f"quantize.layers.{part}", self.layers[part]))
            for part in self.layers
        ]

    def _given(self, where: str, given: object) -> Scheme:
        """The scheme of one entry of `layers`: a format alone, or with its own group."""
        own: Mapping[str, Any] = given if isinstance(given, Mapping) else {"format": given}
        if "format" not in own or set(own) - {"format", "group"}:
            raise CaloraError(where, "a format, or format and group", given, FIX)
        one_of(f"{where}.format", own["format"], tuple(BITS))
        if own["format"] == "int8" and own.get("group") is not None:
            raise CaloraError(f"{where}.group", "none for int8", own["group"], FIX)
        return Scheme(own["format"], None if own["format"] == "int8" else own.get("group", self.group))


def check(model: PreTrainedModel, options: Options) -> None:
    """Raise `CaloraError` if the options do not fit the model's layers, their widths or its embeddings."""
    layers, words = linear_layers(model), words_of_all(model)
    known = sorted({name.rpartition(".")[2] for name in layers})
    meant = [word for word in WORDS if any(word in own for own in words.values())]
    for part in options.layers or ():
        if part not in (*known, *meant):
            expected = f"last parts of layers' names ({', '.join(known)}), or {', '.join(meant)}"
            raise CaloraError("quantize.layers", expected, part, FIX)
    for name, layer in layers.items():
        group = options.scheme(name, words[name]).group
        if group and layer.in_features % group:
            fits = [g for g in GROUPS if layer.in_features % g == 0]
            raise CaloraError(
                "quantize.group",
                f"a divisor of {name}'s {layer.in_features} inputs ({fits or 'none of ours'})",
                group,
                FIX,
            )
    if options.embeddings != "none":
        check_tables(model, options.embeddings)


def check_tables(model: PreTrainedModel, format: str) -> None:
    """Raise `CaloraError` if an embedding table cannot be stored in this format."""
    for name, table in _tables(model).items():
        if type(table) is not nn.Embedding and factor_of(table) is None:
            expected, fix = "plain vectors, or such times embed_scale", "set it to none for this base"
            raise CaloraError(f"quantize.embeddings, {name}", expected, type(table).__name__, fix)
        if not table_packing(table.embedding_dim, format).group:
            expected, fix = "a width divisible by 32", "set it to int8 for this base"
            raise CaloraError(f"quantize.embeddings (int4), {name}", expected, table.embedding_dim, fix)


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
    schemes = {name: options.scheme(name, own) for name, own in words_of(block.name, block.module).items()}
    for group in block.groups():
        first = next(iter(group))
        for scheme in dict.fromkeys(schemes[name] for name in group):
            alike = {name: layer for name, layer in group.items() if schemes[name] == scheme}
            # Only GPTQ gains from going through the columns of several layers together; one alone takes less memory.
            together = [alike] if options.rounding == "gptq" else [{name: layer} for name, layer in alike.items()]
            for layers in together:
                made.modules |= _packed(
                    layers, scheme, block.moments()[first], block.largest()[first], options, block.dtype
                )
    return made


def finish(model: PreTrainedModel, options: Options, _: Plan) -> list[str]:
    """Quantise the embeddings if asked; the names of the new modules."""
    return quantise_tables(model, options.embeddings)


def quantise_tables(model: PreTrainedModel, format: str) -> list[str]:
    """Quantise the embeddings to `int8`, `int4` or `none`; the names of the new modules."""
    made = {} if format == "none" else _embeddings(model, format)
    for name, module in made.items():
        model.set_submodule(name, module)
    return list(made)


def _packed(
    group: dict[str, nn.Linear],
    scheme: Scheme,
    moment: Tensor,
    largest: Tensor,
    options: Options,
    dtype: torch.dtype,
) -> dict[str, nn.Module]:
    """Layers that read the same input, quantised alike: GPTQ goes through their columns together.

    Args:
        moment: X^T X [in, in] of that input.
        largest: |x| [in].
    """
    layers = list(group.values())
    weight = torch.cat([dense_weight(layer, torch.float32) for layer in layers])  # [out of all, in]
    patterns = [layer.keep for layer in layers if isinstance(layer, PackedLinear)]
    keep = torch.cat([pattern for pattern in patterns if pattern is not None]) if patterns else None
    int8 = scheme.format == "int8"
    outliers = (largest >= options.outliers).nonzero().flatten() if options.outliers and int8 else None
    inliers = weight if outliers is None else weight.clone().index_fill_(1, outliers, 0)
    span, symmetric = scheme.group or layers[0].in_features, int8 or options.symmetric
    search = options.range == "search" and not int8
    fit = partial(fit_grid, bits=BITS[scheme.format], group=span, symmetric=symmetric, dtype=dtype, search=search)
    if options.rounding == "nearest":
        importance = moment.diagonal() if keep is None else moment.diagonal() * keep
        grid = fit(inliers, importance=importance)
    else:
        rounded, grid = gptq(inliers, moment, fit, span, keep)
        weight = rounded if outliers is None else rounded.index_copy_(1, outliers, weight[:, outliers])
    packing = Packing(scheme.format, keep is not None, span, symmetric, 0 if outliers is None else len(outliers))
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


def _embeddings(model: PreTrainedModel, format: str) -> dict[str, nn.Module]:
    """Every table and head that shares the input table's weight, and an untied head, in int8 or int4."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(table, nn.Embedding)
    packed_table = PackedEmbedding.pack(table, format)
    packed: dict[str, nn.Module] = {
        name: packed_table if factor_of(own) == packed_table.factor else PackedEmbedding.pack(own, format)
        for name, own in _tables(model).items()
    }
    for name, module in model.named_modules(remove_duplicate=False):
        if module is head and isinstance(module, nn.Linear):
            packing = table_packing(module.in_features, format)
            packed_head = PackedLinear(module.in_features, module.out_features, packing, module.weight.dtype)
            tied = module.weight is table.weight
            tensors = dict(packed_table.state_dict()) if tied else table_tensors(module.weight, format)
            bias = {} if module.bias is None else {"bias": module.bias.detach()}
            packed_head.restore(tensors | bias)
            if tied:
                packed_head.weight = packed_table.weight  # one parameter, also when moved
            packed[name] = packed_head
    return packed
