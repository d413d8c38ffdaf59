"""What a checkpoint holds of one weight: codes on a grid of ours, nf4 codes, or plain values; and the words that codes come in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from calora.layers.codes import Grid
from calora.layers.layout import dense_layer
from calora.layers.nf4 import Nf4Linear
from calora.layers.packed import PackedLinear


@dataclass(frozen=True)
class OnGrid:
    """w = (code - zero) * scale.

    Args:
        codes: int8 [out, in].
        order: the input that each column is of, int64 [in], where it is not that of its place.
    """

    codes: Tensor
    grid: Grid
    order: Tensor | None = None


@dataclass(frozen=True)
class Nf4:
    """bitsandbytes' nf4.

    Args:
        tensors: `weight` and its statistics, by bitsandbytes' names.
    """

    tensors: Mapping[str, Tensor]
    shape: tuple[int, int]


Values = OnGrid | Nf4 | Tensor


def layer_of(values: Values, bias: Tensor | None, dtype: torch.dtype) -> nn.Linear:
    """A layer with these values as they are; plain ones, and the bias, are rounded to `dtype`."""
    bias = None if bias is None else bias.to(dtype)
    if isinstance(values, OnGrid):
        return PackedLinear.on_grid(values.codes, values.grid, bias, dtype, values.order)
    if isinstance(values, Nf4):
        # T5 casts a layer's input to the dtype of its weight: the codes are stored as that dtype, never as uint8.
        codes = values.tensors["weight"].contiguous().flatten().view(torch.uint8).view(dtype).view(-1, 1)
        own = {} if bias is None else {"bias": bias}
        return Nf4Linear(values.shape[1], values.shape[0], dtype).restore({**values.tensors, "weight": codes, **own})
    return dense_layer(values.to(dtype), bias)


def dense_of(values: Values, dtype: torch.dtype) -> Tensor:
    """The dense view of the same values."""
    if isinstance(values, Tensor):
        return values.to(dtype)
    layer = layer_of(values, None, torch.float32 if isinstance(values, OnGrid) else torch.bfloat16)
    assert isinstance(layer, PackedLinear | Nf4Linear)
    return layer.dense_weight(dtype)


def from_words(words: Tensor, bits: int, count: int, dim: int) -> Tensor:
    """The numbers in a stream of bits, uint8: `count` of them along `dim` of int32 words, the first in the lowest bits."""
    words = words.movedim(dim, -1).contiguous()  # [..., n]
    if 32 % bits == 0:
        shifts = torch.arange(0, 32, bits, dtype=torch.int32)
        numbers = ((words.unsqueeze(-1) >> shifts) & (2**bits - 1)).to(torch.uint8).flatten(-2)
    else:  # a number may lie in two words
        stream = ((words.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32)) & 1).to(torch.uint8).flatten(-2)
        whole = stream.shape[-1] // bits * bits
        places = torch.arange(bits, dtype=torch.uint8)
        numbers = (stream[..., :whole].unflatten(-1, (-1, bits)) << places).sum(-1, dtype=torch.uint8)
    found: Tensor = numbers[..., :count].movedim(-1, dim)
    return found


def signed(numbers: Tensor, bits: int) -> Tensor:
    """uint8 numbers of `bits` bits about their middle, int8: 8 of 4 bits is 0."""
    codes: Tensor = (numbers.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    return codes


def grid_of(scale: Tensor, zero: Tensor | None, bits: int) -> Grid:
    """The grid of stored scales and zero points [out, groups]; zero points that are all 0 are none.

    But for 2 bits: without zero points that is a half-step grid here.
    """
    if zero is not None and not bool(zero.any()):
        zero = None
    if zero is None and bits == 2:
        zero = torch.zeros(scale.shape, dtype=torch.int8)
    return Grid(scale.contiguous(), None if zero is None else zero.to(torch.int8).contiguous(), bits)


def grouped(values: OnGrid, index: Tensor) -> Values:
    """The same where `index` int64 [in] says which group each input is of: plain values where groups differ in size."""
    groups, width = values.grid.scale.shape[1], len(index)
    if torch.equal(index, torch.arange(width) // max(width // groups, 1)):
        return values
    order = torch.argsort(index, stable=True)
    if bool((torch.bincount(index, minlength=groups) * groups == width).all()):
        return OnGrid(values.codes[:, order].contiguous(), values.grid, order)
    scale, zero = values.grid.scale.float()[:, index], values.grid.zero
    return (values.codes.float() - (0 if zero is None else zero.float()[:, index])) * scale
