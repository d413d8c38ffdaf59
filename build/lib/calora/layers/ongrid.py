"""The dense view of a packed layer on a grid: its scales can be trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calora.layers.packed import PackedLinear
from calora.recovery.shared import shared_of


class GridLinear(nn.Linear):
    """y = x W^T + b with W = V + B: V = (codes - zero) * scale, and B what is on no grid (outlier columns, the base's recovery).

    `rescale` makes it compute with V * (1 + ratio) + B = W + V * ratio, whose gradient goes to the ratio. So it needs V
    and no codes, and V is W where B is 0.

    Args:
        layer: the packed layer.
        weight: its W [out, in].
    """

    trains_scales = True
    on_grid: Tensor | None

    def __init__(self, layer: PackedLinear, weight: Tensor) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.scale_groups = layer.scale_groups
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach(), requires_grad=False)
        # In tuples, so that nothing of them is a parameter, a buffer or a module of this layer.
        self.beside = shared_of(layer), (layer.get_buffer("outlier_columns") if layer.packing.outliers else None)
        self.ratio: tuple[Tensor] | None = None
        self.register_buffer("on_grid", None, persistent=False)

    def rescale(self, ratio: Tensor | None) -> None:
        """From now on compute with V * (1 + ratio), ratio [out, scale_groups]; None: with V."""
        self.ratio = None if ratio is None else (ratio,)
        self.on_grid = self._values() if self.ratio and any(part is not None for part in self.beside) else None

    def _values(self) -> Tensor:
        """V, where it is not W."""
        recovery, columns = self.beside
        values = self.weight.detach().float()
        if recovery is not None:
            values = values - recovery.weight().to(values.device)
        if columns is not None:
            values = values.index_fill(1, columns.to(values.device).long(), 0)
        return values.to(self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if self.ratio is None:
            return F.linear(x, self.weight, self.bias)
        (ratio,) = self.ratio
        values, shape = self.weight if self.on_grid is None else self.on_grid, (*ratio.shape, -1)
        weight = torch.addcmul(self.weight.view(shape), values.view(shape), ratio.unsqueeze(-1)).flatten(1)
        return F.linear(x, weight, self.bias)
