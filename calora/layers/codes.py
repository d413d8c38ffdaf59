"""Integer grids for weights, and the bit packing of their codes and of sparse patterns.

Tensor names and layouts of dense int8 and int4 weights are those of compressed-tensors (`int-quantized`, `pack-quantized`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RANGE = {8: (-127, 127), 4: (-8, 7)}  # int8 leaves out -128, so that the grid is symmetric
_BITS = torch.arange(8, dtype=torch.uint8)
_BYTES = ((torch.arange(256, dtype=torch.uint8).unsqueeze(1) >> _BITS) & 1).bool()  # [256, 8]


@dataclass(frozen=True)
class Grid:
    """A uniform grid: w ~ (code - zero) * scale, one scale for each `group` consecutive inputs of a row.

    Args:
        scale: [out, in / group], in the dtype in which it is stored.
        zero: int8 [out, in / group], or None for a symmetric grid.
        bits: 8 or 4.
    """

    scale: Tensor
    zero: Tensor | None
    bits: int

    def encode(self, weight: Tensor) -> Tensor:
        """Nearest codes, int8 [out, in]."""
        scale, zero = self._spread(weight.shape[1])
        return _round(weight.float() / scale + zero, self.bits).to(torch.int8)

    def decode(self, codes: Tensor) -> Tensor:
        """fp32 [out, in]."""
        scale, zero = self._spread(codes.shape[1])
        return (codes.float() - zero) * scale

    def column(self, weight: Tensor) -> Tensor:
        """Values [out] of one input, rounded to the grid of its group (there is no other in this grid), fp32."""
        scale = self.scale[:, 0].float()
        zero = 0.0 if self.zero is None else self.zero[:, 0].float()
        return (_round(weight / scale + zero, self.bits) - zero) * scale

    @classmethod
    def of_groups(cls, grids: Sequence[Grid]) -> Grid:
        """The grids of single groups, side by side."""
        zeros = [grid.zero for grid in grids if grid.zero is not None]
        return cls(torch.cat([grid.scale for grid in grids], 1), torch.cat(zeros, 1) if zeros else None, grids[0].bits)

    def of_rows(self, rows: slice) -> Grid:
        """The grid of some rows."""
        return Grid(self.scale[rows], None if self.zero is None else self.zero[rows], self.bits)

    def _spread(self, width: int) -> tuple[Tensor, Tensor | float]:
        repeat = width // self.scale.shape[1]
        scale = self.scale.float().repeat_interleave(repeat, 1)
        return scale, 0.0 if self.zero is None else self.zero.float().repeat_interleave(repeat, 1)


def _round(values: Tensor, bits: int) -> Tensor:
    return values.round().clamp(*RANGE[bits])


def fit_grid(weight: Tensor, bits: int, group: int, symmetric: bool, dtype: torch.dtype) -> Grid:
    """The grid that spans the weights of each group.

    Symmetric: scale = max|w| / 127 (int8), / 7.5 (int4: the codes -8 to 7). Asymmetric: scale = (max - min) / 15.

    Args:
        weight: [out, in]; `group` divides in.
        dtype: of the stored scale; codes are rounded to the scale as it is stored.
    """
    groups = weight.float().view(weight.shape[0], -1, group)
    low, high = RANGE[bits]
    if symmetric:
        largest = groups.abs().amax(-1)
        scale = largest / (high if bits == 8 else (high - low) / 2)
        return Grid(_usable(scale, dtype), None, bits)
    smallest, largest = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
    scale = _usable((largest - smallest) / (high - low), dtype)
    zero = (low - smallest / scale.float()).round().clamp(low, high).to(torch.int8)
    return Grid(scale, zero, bits)


def nearest_rows(weight: Tensor, rows: int = 4096) -> tuple[Tensor, Tensor]:
    """int8 codes [out, in] and scales [out, 1] of a table, some rows at a time: its fp32 copy never exists as a whole."""
    weight = weight.detach()
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = weight.new_empty(len(weight), 1)
    for start in range(0, len(weight), rows):
        part = weight[start : start + rows]
        grid = fit_grid(part, 8, weight.shape[1], True, weight.dtype)
        codes[start : start + rows], scale[start : start + rows] = grid.encode(part), grid.scale
    return codes, scale


def _usable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where(scale > 0, scale, torch.ones_like(scale)).to(dtype)


def pack_mask(mask: Tensor) -> Tensor:
    """bool [out, in] -> uint8 [out, ceil(in / 8)], the first input in the lowest bit."""
    padded = torch.nn.functional.pad(mask, (0, -mask.shape[1] % 8))
    return (padded.view(mask.shape[0], -1, 8).to(torch.uint8) << _BITS.to(mask.device)).sum(-1, dtype=torch.uint8)


def unpack_mask(packed: Tensor, width: int) -> Tensor:
    """The inverse of `pack_mask`, bool [out, width]."""
    table = _BYTES.to(packed.device)
    return table[packed.flatten().int()].view(packed.shape[0], -1)[:, :width]


def pack_nibbles(codes: Tensor) -> Tensor:
    """int8 codes in [-8, 7], [..., n] -> uint8 [..., ceil(n / 2)], the first of two in the low bits."""
    shifted = torch.nn.functional.pad((codes + 8).to(torch.uint8), (0, codes.shape[-1] % 2))
    return shifted[..., ::2] | (shifted[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor, count: int) -> Tensor:
    """The inverse of `pack_nibbles`, int8 [..., count]."""
    pairs = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
    return pairs[..., :count].to(torch.int8) - 8


def pack_words(codes: Tensor) -> Tensor:
    """int8 codes in [-8, 7], [out, n] -> int32 [out, ceil(n / 8)]."""
    nibbles = pack_nibbles(codes)
    return torch.nn.functional.pad(nibbles, (0, -nibbles.shape[1] % 4)).contiguous().view(torch.int32)


def unpack_words(packed: Tensor, count: int) -> Tensor:
    """The inverse of `pack_words`, int8 [out, count]."""
    return unpack_nibbles(packed.contiguous().view(torch.uint8), count)
