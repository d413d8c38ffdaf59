"""Integer grids for weights, and the bit packing of their codes and of sparse patterns.

Tensor names and layouts of dense int8 and int4 weights are those of compressed-tensors (`int-quantized`, `pack-quantized`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

RANGE = {8: (-127, 127), 4: (-8, 7), 3: (-4, 3), 2: (-2, 1)}  # int8 leaves out -128, so that the grid is symmetric
SHRINKS = [1 - step / 40 for step in range(1, 29)]  # of a range that is searched: 0.975 to 0.3 of what the weights span
ROWS = 1024  # of a table that are in fp32 at a time
_BITS = torch.arange(8, dtype=torch.uint8)
_BYTES = ((torch.arange(256, dtype=torch.uint8).unsqueeze(1) >> _BITS) & 1).bool()  # [256, 8]


@dataclass(frozen=True)
class Grid:
    """A uniform grid: w ~ (code - zero) * scale, one scale for each `group` consecutive inputs of a row.

    The symmetric one of 2 bits is a half-step grid: -1.5, -0.5, 0.5 and 1.5 times the scale, without a 0 (ParetoQ,
    arXiv 2502.02631): around a code for 0 only three of four levels would be symmetric.

    Args:
        scale: [out, in / group], in the dtype in which it is stored.
        zero: int8 [out, in / group], or None for a symmetric grid.
        bits: 8, 4, 3 or 2.
    """

    scale: Tensor
    zero: Tensor | None
    bits: int

    @property
    def half_step(self) -> bool:
        """Whether no code of it is 0."""
        return self.zero is None and self.bits == 2

    def encode(self, weight: Tensor) -> Tensor:
        """Nearest codes, int8 [out, in]."""
        scale, zero = self._spread()
        groups = _split(weight.float(), self.scale.shape[-1])  # [out, in / group, group]
        return _round(groups / scale + zero, self.bits).flatten(-2).to(torch.int8)

    def decode(self, codes: Tensor) -> Tensor:
        """fp32 [out, in]."""
        scale, zero = self._spread()
        levels = _split(codes.to(torch.float32, copy=True), self.scale.shape[-1])
        return levels.sub_(zero).mul_(scale).flatten(-2)

    def column(self, weight: Tensor) -> Tensor:
        """Values [out] of one input, rounded to the grid of its group (there is no other in this grid), fp32."""
        scale, zero = self._spread()
        scale, zero = scale[:, 0, 0], zero if isinstance(zero, float) else zero[:, 0, 0]
        return (_round(weight / scale + zero, self.bits) - zero) * scale

    def widened(self, codes: Tensor) -> tuple[Tensor, Grid]:
        """Codes of 3 or 2 bits as those of a symmetric grid of 4 bits: exactly the same values.

        Code minus zero is at most 7, and the levels of a half-step grid are the odd multiples of half its scale.
        """
        if self.half_step:
            return 2 * codes + 1, Grid(self.scale / 2, None, 4)
        zero = 0 if self.zero is None else self.zero.unsqueeze(-1)
        return (_split(codes, self.scale.shape[-1]) - zero).flatten(-2), Grid(self.scale, None, 4)

    def rescaled(self, ratio: Tensor) -> Grid:
        """The grid with scale * (1 + ratio), ratio [out, in / group], in the wider dtype of the two: 0 changes nothing."""
        dtype = torch.promote_types(self.scale.dtype, ratio.dtype)
        return replace(self, scale=(self.scale.float() * (1 + ratio.float())).to(dtype))

    @classmethod
    def of_groups(cls, grids: Sequence[Grid]) -> Grid:
        """The grids of single groups, side by side."""
        zeros = [grid.zero for grid in grids if grid.zero is not None]
        return cls(torch.cat([grid.scale for grid in grids], 1), torch.cat(zeros, 1) if zeros else None, grids[0].bits)

    def of_rows(self, rows: slice) -> Grid:
        """The grid of some rows."""
        return Grid(self.scale[rows], None if self.zero is None else self.zero[rows], self.bits)

    def _spread(self) -> tuple[Tensor, Tensor | float]:
        """Scale and zero, fp32 [out, in / group, 1]."""
        zero = -0.5 if self.half_step else 0.0
        return self.scale.float().unsqueeze(-1), zero if self.zero is None else self.zero.float().unsqueeze(-1)


def _split(values: Tensor, parts: int) -> Tensor:
    """[..., n] -> [..., parts, n / parts]."""
    return values.reshape(*values.shape[:-1], parts, values.shape[-1] // parts)


def _round(values: Tensor, bits: int) -> Tensor:
    return values.round().clamp(*RANGE[bits])


def fit_grid(
    weight: Tensor,
    bits: int,
    group: int,
    symmetric: bool,
    dtype: torch.dtype,
    search: bool = False,
    importance: Tensor | None = None,
) -> Grid:
    """The grid that spans the weights of each group, or the best of smaller ones.

    Symmetric: scale = max|w| / 127 (int8), / 7.5, 3.5, 1.5 (int4, int3, int2: half of the codes' range).
    Asymmetric: scale = (max - min) / 15, 7, 3.

    Args:
        weight: [out, in]; `group` divides in.
        dtype: of the stored scale; codes are rounded to the scale as it is stored.
        search: shrink the range of each group to the one of `SHRINKS` whose rounding error is least: the fewer the
            levels, the more a step costs that the largest weight alone asks for.
        importance: of the squared error of each weight in that search, [out, in] or [in].
    """
    groups = weight.float().view(weight.shape[0], -1, group)
    if symmetric:
        largest = groups.abs().amax(-1)
        smallest = -largest
    else:
        smallest, largest = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
    grid = _spanning(smallest, largest, bits, symmetric, dtype)
    if not search:
        return grid
    shares = None if importance is None else importance.expand_as(weight).reshape(groups.shape)
    least = _rounding_error(groups, grid, shares)
    for shrink in SHRINKS:
        smaller = _spanning(shrink * smallest, shrink * largest, bits, symmetric, dtype)
        error = _rounding_error(groups, smaller, shares)
        better, least = error < least, torch.minimum(error, least)
        zero = None if grid.zero is None or smaller.zero is None else torch.where(better, smaller.zero, grid.zero)
        grid = Grid(torch.where(better, smaller.scale, grid.scale), zero, bits)
    return grid


def _spanning(smallest: Tensor, largest: Tensor, bits: int, symmetric: bool, dtype: torch.dtype) -> Grid:
    """The grid from the smallest to the largest values, both [out, in / group]."""
    low, high = RANGE[bits]
    if symmetric:
        empty = torch.finfo(dtype).tiny if bits == 2 else 1.0  # where all is 0, a half-step grid has to be as small
        return Grid(_usable(largest / (high if bits == 8 else (high - low) / 2), dtype, empty), None, bits)
    scale = _usable((largest - smallest) / (high - low), dtype)
    zero = (low - smallest / scale.float()).round().clamp(low, high).to(torch.int8)
    return Grid(scale, zero, bits)


def _rounding_error(groups: Tensor, grid: Grid, importance: Tensor | None) -> Tensor:
    """Squared error [out, in / group] of rounding groups [out, in / group, group]."""
    scale, zero = grid._spread()
    rounded = groups.div(scale).add_(zero).round_().clamp_(*RANGE[grid.bits]).sub_(zero).mul_(scale)
    error = rounded.sub_(groups).square_()
    return (error if importance is None else error.mul_(importance)).sum(-1)


def fit_table(weight: Tensor, fit: Callable[[Tensor], Grid], rows: int = ROWS) -> tuple[Tensor, Grid]:
    """int8 codes [out, in] of a table and its grid, some rows at a time: its fp32 copy never exists as a whole."""
    weight = weight.detach()
    parts = weight.split(rows)
    grids = [fit(part) for part in parts]
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for own, part, grid in zip(codes.split(rows), parts, grids, strict=True):
        own.copy_(grid.encode(part))
    zeros = [grid.zero for grid in grids if grid.zero is not None]
    whole = Grid(torch.cat([grid.scale for grid in grids]), torch.cat(zeros) if zeros else None, grids[0].bits)
    return codes, whole


def nearest_rows(weight: Tensor, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    """int8 codes [out, in] and scales [out, 1] of a table."""
    fit = partial(fit_grid, bits=8, group=weight.shape[1], symmetric=True, dtype=weight.dtype)
    codes, grid = fit_table(weight, fit, rows)
    return codes, grid.scale


def _usable(scale: Tensor, dtype: torch.dtype, empty: float = 1.0) -> Tensor:
    return torch.where(scale > 0, scale, torch.full_like(scale, empty)).to(dtype)


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
    padded = torch.nn.functional.pad(nibbles, (0, -nibbles.shape[1] % 4))
    return padded.flatten().view(torch.int32).view(len(codes), -1)  # of one row the strides may be odd


def unpack_words(packed: Tensor, count: int) -> Tensor:
    """The inverse of `pack_words`, int8 [out, count]."""
    return unpack_nibbles(packed.contiguous().view(torch.uint8), count)


def pack_planes(codes: Tensor, bits: int) -> Tensor:
    """int8 codes of 3 or 2 bits, [..., n] -> uint8 [..., ceil(n / 4)], and for 3 bits ceil(n / 8) more bytes.

    The two low bits of each code are a plane, the third one is another. Byte j of a plane of m bytes holds codes j,
    j + m, j + 2 m and so on, the first in the lowest bits: a plane is read in runs, not in steps.
    """
    shifted = (codes - RANGE[bits][0]).to(torch.uint8)
    planes = [_fold(shifted & 3, 2)] + ([_fold(shifted >> 2, 1)] if bits == 3 else [])
    return torch.cat(planes, -1)


def unpack_planes(packed: Tensor, count: int, bits: int) -> Tensor:
    """The inverse of `pack_planes`, int8 [..., count]."""
    low = -(-count // 4)
    codes = _unfold(packed[..., :low], 2)[..., :count]
    if bits == 3:
        codes = codes | (_unfold(packed[..., low:], 1)[..., :count] << 2)
    return codes.view(torch.int8) + RANGE[bits][0]


def _fold(values: Tensor, bits: int) -> Tensor:
    """uint8 values below 2^bits, [..., n] -> [..., ceil(n bits / 8)]."""
    parts = 8 // bits
    padded = torch.nn.functional.pad(values, (0, -values.shape[-1] % parts))
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=values.device).unsqueeze(1)
    return (_split(padded, parts) << shifts).sum(-2, dtype=torch.uint8)


def _unfold(packed: Tensor, bits: int) -> Tensor:
    """uint8 [..., m] -> [..., m 8 / bits], the inverse of `_fold` but for its padding."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device).unsqueeze(1)
    values: Tensor = (packed.unsqueeze(-2) >> shifts) & (2**bits - 1)
    return values.flatten(-2)


def pack(codes: Tensor, bits: int) -> Tensor:
    """int8 codes of 4, 3 or 2 bits, [out, n], as they are stored: words for 4 bits, planes for fewer."""
    return pack_words(codes) if bits == 4 else pack_planes(codes, bits)


def unpack(packed: Tensor, count: int, bits: int) -> Tensor:
    """The inverse of `pack`, int8 [out, count]."""
    return unpack_words(packed, count) if bits == 4 else unpack_planes(packed, count, bits)
