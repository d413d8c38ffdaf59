"""compressed-tensors' layouts of weights, as llm-compressor writes them: pack-quantized, int-quantized, naive- and float-quantized.

pack-quantized: `weight_packed` int32 [out, in bits / 32], `weight_scale` [out, groups], `weight_zero_point` int32 [out bits / 32,
groups] or none, `weight_g_idx` [in] or none. The others: `weight` int8 or fp8 [out, in] with scales of a row, of groups or of all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from calora.errors import CaloraError
from calora.taken.values import OnGrid, Values, grid_of, grouped, signed

MARK = "weight_scale"
PARTS = (
    "weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx",
    "input_scale", "input_zero_point", "output_scale", "output_zero_point",
)  # fmt: skip
FORMATS = ("pack-quantized", "int-quantized", "naive-quantized", "float-quantized")


def check(settings: Mapping[str, Any], where: str) -> None:
    """Raise `CaloraError` unless all of its formats are read here."""
    groups = settings.get("config_groups", {}).values()
    found = {str(group.get("format") or settings.get("format")) for group in groups if isinstance(group, Mapping)}
    sparse = settings.get("sparsity_config") or {}
    if sparse.get("format", "dense") != "dense":
        found.add(str(sparse["format"]))
    if found - set(FORMATS):
        other = ", ".join(sorted(found - set(FORMATS)))
        raise CaloraError(where, f"formats {', '.join(FORMATS)}", other, "save it uncompressed, or in one of them")


def read(parts: Mapping[str, Tensor], settings: Mapping[str, Any], shape: tuple[int, int]) -> Values:
    """The weight [out, in] of one layer; of what is quantised as it runs (activations) nothing is taken."""
    out, width = shape
    scale, zero = parts["weight_scale"], parts.get("weight_zero_point")
    if "weight_packed" not in parts:
        weight = parts["weight"]
        scale = scale.reshape(-1, 1).expand(out, 1) if scale.numel() in (1, out) else scale
        if weight.dtype != torch.int8:
            return _blocks(weight.float(), scale.float())
        zero = None if zero is None else zero.to(torch.int8).expand(scale.shape)
        return OnGrid(weight, grid_of(scale, zero, 8))
    bits = next(bits for bits in (2, 3, 4, 8) if -(-width // (32 // bits)) == parts["weight_packed"].shape[1])
    codes = signed(_numbers(parts["weight_packed"], bits, width), bits)
    if zero is not None and zero.dtype == torch.int32:
        zero = signed(_numbers(zero.T, bits, out), bits).T
    values = OnGrid(codes, grid_of(scale, zero, bits))
    index = parts.get("weight_g_idx")
    return values if index is None or bool((index < 0).any()) else grouped(values, index.long())


def _numbers(words: Tensor, bits: int, count: int) -> Tensor:
    """uint8 [n, count] of int32 words [n, ...]: as many whole numbers as a word holds, the first in the lowest bits."""
    shifts = torch.arange(32 // bits, dtype=torch.int32) * bits
    numbers: Tensor = ((words.unsqueeze(-1) >> shifts) & (2**bits - 1)).to(torch.uint8).flatten(-2)
    return numbers[:, :count].contiguous()


def _blocks(weight: Tensor, scale: Tensor) -> Tensor:
    """Values with a scale for each block of rows and columns."""
    rows, columns = (-(-size // parts) for size, parts in zip(weight.shape, scale.shape, strict=True))
    spread = scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return weight * spread[: weight.shape[0], : weight.shape[1]]
