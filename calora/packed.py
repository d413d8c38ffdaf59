"""Linear and embedding layers whose weight stays packed: int8 codes, kept values of 2:4 groups, or both."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calora.errors import CaloraError

PATTERNS = ("dense", "2:4")
FORMATS = ("native", "int8")  # native: the dtype of the base


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric per-row int8: w ~ code * scale, scale = max|w| / 127. [out, in] -> (int8 [out, in], fp32 [out, 1])."""
    weight = weight.float()
    largest = weight.abs().amax(dim=1, keepdim=True)
    scale = torch.where(largest > 0, largest / 127, torch.ones_like(largest))
    return (weight / scale).round().clamp(-127, 127).to(torch.int8), scale


def pack_2_4(weight: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Kept values [out, in/2] and their 2-bit positions, four to a byte, uint8 [out, ceil(in/8)].

    `keep` [out, in] is True at exactly two of every four consecutive inputs.
    """
    rows, width = weight.shape
    if width % 4:
        raise CaloraError("2:4 packing", "an input width divisible by 4", width, "leave this layer out of the recipe")
    groups = keep.view(rows, width // 4, 4)
    if not bool((groups.sum(-1) == 2).all()):
        raise CaloraError("2:4 packing", "two kept weights in each group of four", "another count", "prune to 2:4")
    places = groups.nonzero()[:, 2].view(rows, width // 2)  # in order, so two a group
    values = weight.gather(1, places + torch.arange(width // 4).repeat_interleave(2) * 4)
    padded = F.pad(places, (0, -places.shape[1] % 4)).view(rows, -1, 4)
    positions = (padded << torch.tensor([0, 2, 4, 6])).sum(-1).to(torch.uint8)
    return values, positions


def unpack_positions(positions: Tensor, kept: int) -> Tensor:
    """uint8 [out, ceil(kept/4)] -> position of each kept value within its group of four, int64 [out, kept]."""
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)
    return ((positions.unsqueeze(-1) >> shifts) & 3).flatten(1)[:, :kept].long()


class PackedLinear(nn.Linear):
    """y = x W^T + b with W stored packed; the dense W exists only within one forward call.

    Args:
        in_features, out_features, bias: as in `nn.Linear`.
        pattern: `dense`, or `2:4` (two of every four consecutive inputs kept).
        format: `native` (kept values in `dtype`) or `int8` (codes and one fp32 scale an output row).
        dtype: dtype of the bias, and of the kept values where they are native.
    """

    scale: Tensor | None
    positions: Tensor | None

    def __init__(
        self, in_features: int, out_features: int, bias: bool, pattern: str, format: str, dtype: torch.dtype
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.pattern, self.format = in_features, out_features, pattern, format
        kept = in_features // 2 if pattern == "2:4" else in_features
        values = torch.empty(out_features, kept, dtype=torch.int8 if format == "int8" else dtype)
        self.weight = nn.Parameter(values, requires_grad=False)
        self.register_buffer("scale", torch.empty(out_features, 1) if format == "int8" else None)
        positions = torch.empty(out_features, -(-kept // 4), dtype=torch.uint8) if pattern == "2:4" else None
        self.register_buffer("positions", positions)
        self.register_parameter("bias", None)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype), requires_grad=False)

    @classmethod
    def pack(cls, layer: nn.Linear, keep: Tensor | None, format: str) -> PackedLinear:
        """Pack a dense layer. `keep` [out, in] marks its 2:4 pattern; None keeps all weights."""
        weight = layer.weight.detach()
        pattern = "dense" if keep is None else "2:4"
        packed = cls(layer.in_features, layer.out_features, layer.bias is not None, pattern, format, layer.weight.dtype)
        if keep is not None:
            weight, packed.positions = pack_2_4(weight, keep)
        if layer.bias is not None:
            packed.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
        packed._store(weight)
        return packed

    def quantize(self) -> PackedLinear:
        """The same layer with its kept values in int8."""
        packed = PackedLinear(
            self.in_features, self.out_features, self.bias is not None, self.pattern, "int8", self.weight.dtype
        )
        packed.positions, packed.bias = self.positions, self.bias
        packed._store(self.weight.detach())
        return packed

    def _store(self, values: Tensor) -> None:
        if self.format == "int8":
            values, self.scale = quantize_int8(values)
        self.weight = nn.Parameter(values, requires_grad=False)

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """W [out, in] in `dtype`: the dense view of the same values."""
        values = self.weight.detach()
        if self.scale is not None:
            values = values * self.scale
        values = values.to(dtype)
        if self.positions is None:
            return values
        rows, kept = values.shape
        places = unpack_positions(self.positions, kept).view(rows, -1, 2)
        dense = torch.zeros(rows, kept // 2, 4, dtype=dtype)
        return dense.scatter_(2, places, values.view(rows, -1, 2)).view(rows, kept * 2)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows `ids` of W [len(ids), in]; only a dense pattern can be read by rows."""
        values = self.weight.detach()[ids]
        return (values if self.scale is None else values * self.scale[ids]).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], computed in the dtype of `x`."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.dense_weight(x.dtype), bias)

    def extra_repr(self) -> str:
        """Shape and packing, as `print(model)` shows them."""
        return f"{self.in_features} -> {self.out_features}, {self.pattern} {self.format}"


class PackedEmbedding(nn.Embedding):
    """An embedding table in int8 with one fp32 scale a row; rows come out in `dtype`."""

    scale: Tensor

    def __init__(self, rows: int, width: int, padding_idx: int | None, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim, self.padding_idx = rows, width, padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self.dtype = dtype
        self.weight = nn.Parameter(torch.empty(rows, width, dtype=torch.int8), requires_grad=False)
        self.register_buffer("scale", torch.empty(rows, 1))

    @classmethod
    def pack(cls, layer: nn.Embedding) -> PackedEmbedding:
        """Quantise an embedding table row by row."""
        packed = cls(layer.num_embeddings, layer.embedding_dim, layer.padding_idx, layer.weight.dtype)
        codes, packed.scale = quantize_int8(layer.weight.detach())
        packed.weight = nn.Parameter(codes, requires_grad=False)
        return packed

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """The table [rows, width] in `dtype`."""
        return (self.weight.detach() * self.scale).to(dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Ids [...] -> vectors [..., width]."""
        return (self.weight[input] * self.scale[input]).to(self.dtype)
