"""The weights of a compressed layer as blocks of GGUF: the same numbers, or a reason why there are none.

A block is 32 inputs of one output with one scale d in fp16: w = d q (Q8_0, q of 8 bits), d (q - 8) (Q4_0, 4 bits) or
d (q - 16) (Q5_0, 5 bits). calora's w = (code - zero) * scale, so that d is the scale of the group, repeated, and q the
level code - zero, moved: it is in [-127, 127] of int8, [-8, 7] of symmetric int4, [-7, 7] of int3 and int2, and [-15, 15] of
asymmetric int4. Exact wherever the scale, which is stored in bf16, is a number in fp16: 7.7e-6 to 65504, and some below.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor, nn

from calora.errors import CaloraError
from calora.layers.experts import ExpertLinear
from calora.layers.layout import own_weight
from calora.layers.nf4 import Nf4Linear
from calora.layers.packed import PackedEmbedding, PackedLinear, table_packing

BLOCK = 32  # inputs
EXACT = {"int8": Type.Q8_0, "int4": Type.Q4_0, "int3": Type.Q4_0, "int2": Type.Q4_0}
ASYMMETRIC = Type.Q5_0  # of int4: its levels need five bits
PLAIN = {torch.bfloat16: Type.BF16, torch.float16: Type.F16, torch.float32: Type.F32}
REQUANTISED = ("Q8_0", "Q5_0", "Q4_0", "BF16", "F16", "F32")  # what a layer without an exact type may become
RECIPE = "compress with quantize: {format: int4, group: 32, symmetric: true} (the recipe `device`)"


class NoExactType(Exception):
    """No type of GGUF holds the numbers of a layer; `fix` is another recipe, `final` where rounding is no way out either."""

    def __init__(self, found: str, fix: str, final: bool = False) -> None:
        super().__init__(found)
        self.found, self.fix, self.final = found, fix, final


@dataclass(frozen=True)
class Blocks:
    """A tensor as GGUF has it.

    Args:
        type: of GGUF.
        data: bytes uint8 [rows, bytes of a row], or fp32 [n] of a vector.
    """

    type: Type
    data: np.ndarray[Any, Any]

    def rows(self, order: np.ndarray[Any, Any]) -> Blocks:
        """The rows (or the entries of a vector) in another order."""
        return Blocks(self.type, self.data[order])

    def values(self) -> Tensor:
        """What a reader has, fp32, by gguf's own functions."""
        return torch.from_numpy(np.array(gguf.dequantize(self.data, self.type), dtype=np.float32))


def exact(layer: nn.Module) -> Blocks:
    """The weight of a layer, number for number, without its recovery.

    Raises:
        NoExactType: no type holds them.
    """
    if isinstance(layer, ExpertLinear):
        found = "experts that count alike, where llama.cpp weighs each by its router"
        raise NoExactType(found, "compress without `moefy`", final=True)
    if isinstance(layer, Nf4Linear):
        raise NoExactType("nf4, whose 16 levels no type of GGUF has", RECIPE)
    if isinstance(layer, PackedEmbedding):
        if layer.factor is not None:
            raise NoExactType(f"a table whose vectors are multiplied by {layer.factor}", "use another base", final=True)
        layer = as_linear(layer)
    if not isinstance(layer, PackedLinear) or layer.packing.format == "native":
        dtype: torch.dtype = layer.dtype if isinstance(layer, PackedLinear) else layer.get_parameter("weight").dtype
        return plain(own_weight(layer, dtype))
    if layer.packing.outliers:
        raise NoExactType("columns in the base's dtype beside int8 codes", "compress without `outliers`")
    values, scale = levels(layer)
    asymmetric = layer.packing.format == "int4" and not layer.packing.symmetric
    return packed(values, scale, ASYMMETRIC if asymmetric else EXACT[layer.packing.format])


def as_linear(table: PackedEmbedding) -> PackedLinear:
    """A packed table as a layer with the same codes."""
    packing = table_packing(table.embedding_dim, table.format)
    tensors = {name: tensor.detach() for name, tensor in table.state_dict().items()}
    return PackedLinear(table.embedding_dim, table.num_embeddings, packing, table.dtype).restore(tensors)


def levels(layer: PackedLinear) -> tuple[Tensor, Tensor]:
    """(int8 [out, in], scale [out, groups]) with w = level * scale, exactly; 0 where nothing was kept."""
    codes, grid = layer.codes(), layer.grid
    if grid.bits < 8:
        codes, grid = grid.widened(codes)
    keep = layer.keep
    return codes if keep is None else codes * keep, grid.scale


def packed(values: Tensor, scale: Tensor, kind: Type) -> Blocks:
    """Levels int8 [out, in] and their scales [out, groups] as blocks.

    Raises:
        NoExactType: blocks do not divide a group, or fp16 does not hold a scale.
    """
    out, inputs = values.shape
    group = inputs // scale.shape[1]
    if group % BLOCK:
        found = f"groups of {group} inputs, where a block has {BLOCK}"
        raise NoExactType(found, f"use a base whose widths are multiples of {BLOCK}")
    half = scale.detach().float().half()
    wrong = int((half.float() != scale.float()).sum())
    if wrong:
        raise NoExactType(f"{wrong} of {scale.numel()} scales that fp16 rounds", "use another base")
    d = half.repeat_interleave(group // BLOCK, 1).numpy()[..., None].view(np.uint8)  # [out, blocks, 2]
    q = values.view(out, -1, BLOCK).numpy()  # [out, blocks, 32]
    parts = [d, q.view(np.uint8)] if kind == Type.Q8_0 else [d, *_nibbles(q, 8 if kind == Type.Q4_0 else 16)]
    return Blocks(kind, np.concatenate(parts, -1).reshape(out, -1))


def _nibbles(q: np.ndarray[Any, Any], middle: int) -> list[np.ndarray[Any, Any]]:
    """Levels [out, blocks, 32] as ggml packs them: fifth bits if there are any, then the low four bits of j and j + 16 in a byte."""
    shifted = (q + np.int8(middle)).astype(np.uint8)
    low = (shifted[..., :16] & 15) | ((shifted[..., 16:] & 15) << 4)
    return [low] if middle == 8 else [np.packbits(shifted >> 4, axis=-1, bitorder="little"), low]


def plain(tensor: Tensor) -> Blocks:
    """A dense matrix [out, in] in its own dtype, or a vector in fp32 (which holds every value of the others)."""
    tensor = tensor.detach().contiguous()
    if tensor.ndim == 1 or tensor.dtype == torch.float32:
        return Blocks(Type.F32, tensor.float().numpy())
    return Blocks(PLAIN[tensor.dtype], tensor.view(torch.uint8).numpy())


def rounded(tensor: Tensor, name: str) -> Blocks:
    """A matrix [out, in] in another type, one of `REQUANTISED`, each value to its nearest.

    Raises:
        CaloraError: its blocks do not divide the rows.
    """
    kind = Type[name]
    if tensor.shape[1] % gguf.GGML_QUANT_SIZES[kind][0]:
        expected = f"rows of a multiple of {BLOCK} inputs for {name}"
        raise CaloraError("requantise", expected, tensor.shape[1], "choose BF16, F16 or F32")
    data = gguf.quantize(tensor.float().numpy(), kind)
    return Blocks(kind, data if kind == Type.F32 else data.view(np.uint8))


def relative_error(blocks: Blocks, values: Tensor) -> float:
    """||W' - W|| / ||W|| of what a reader has, 0 where it is the same."""
    return float((blocks.values() - values.float()).norm() / values.float().norm().clamp_min(1e-30))


def count_types(tensors: Mapping[str, Blocks]) -> dict[str, int]:
    """Type -> how many tensors of more than one dimension have it."""
    found: dict[str, int] = {}
    for blocks in tensors.values():
        if blocks.data.ndim > 1:
            found[blocks.type.name] = found.get(blocks.type.name, 0) + 1
    return dict(sorted(found.items()))
