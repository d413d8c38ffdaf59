"""torch's int4 layout for CPUs, unpacked: its kernel is made for few rows, for many a bf16 product is faster."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

MANY_ROWS = 64  # from here on unpacking the weight and a bf16 product take less time than the kernel (AVX-512)


def unpacked(layout: Tensor, scales: Tensor) -> Tensor:
    """W^T [in, out] in the dtype of the scales.

    Args:
        layout: uint8 [out, in / 2], where `unpacks` says so.
        scales: [groups, out, 2], w = code * scale + shift.
    """
    scale, shift = scales.permute(2, 0, 1).contiguous().unsqueeze(2)  # each [groups, 1, out]
    codes = codes_of(layout, block(), scales.dtype)  # [in, out]
    grouped = codes.view(len(scales), -1, len(layout))
    torch.addcmul(shift, grouped, scale, out=grouped)
    return codes


def unpacks(layout: Tensor) -> bool:
    """Whether a layout is one that `unpacked` reads."""
    return block() > 0 and len(layout) % block() == 0


def codes_of(layout: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """The codes -8 to 7, [in, out], of a layout in blocks of so many outputs.

    A block has, for one input after another, a byte for each output of its first half; the high bits are of the second half.
    """
    blocks = layout.view(-1, 2 * layout.shape[1], rows // 2).transpose(0, 1)  # [in, blocks, rows / 2]
    codes = torch.empty(*blocks.shape[:2], 2, rows // 2, dtype=dtype)
    for half, values in enumerate((blocks & 15, blocks >> 4)):
        codes[:, :, half] = values.view(torch.int8).sub_(8)
    return codes.view(len(blocks), -1)


@functools.cache
def block() -> int:
    """The outputs of a block of the layout on this processor; 0 where it is not as `codes_of` reads it."""
    codes = torch.randint(16, (64, 4), generator=torch.Generator().manual_seed(0))  # [out, in]
    layout = torch._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    fits = (rows for rows in (64, 32, 16) if torch.equal(codes_of(layout, rows, torch.int64), codes.T - 8))
    return next(fits, 0)
