"""A packed layer to train beside: its weight is dense within a call alone, in the forward pass and again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calora.layers.nf4 import Nf4Linear
from calora.layers.ongrid import GridLinear
from calora.layers.packed import PackedLinear

ROWS = 8192  # of a head that are dense at a time: most of a small model's weights are there


class UnpackingLinear(nn.Linear):
    """y = x W^T + b and dL/dx = dL/dy W with W unpacked in each of the two: the values of the dense view, to the bit.

    A task's scales get the gradient of the dense view (`GridLinear`) too; for that the inputs are kept, and the product is
    computed again. A head, which takes no adapter, is multiplied some rows at a time.

    Args:
        layer: the packed layer; what belongs to the base beside it is part of W.
        view: dtype -> its dense view.
        dtype: to compute in.
    """

    trains_scales = True

    def __init__(
        self, layer: PackedLinear | Nf4Linear, view: Callable[[torch.dtype], nn.Module], dtype: torch.dtype
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.view, self.dtype = view, dtype
        # In tuples, so that nothing of them is a parameter, a buffer or a module of this layer.
        self.packed: tuple[PackedLinear | Nf4Linear] = (layer,)
        self.ratio: tuple[Tensor] | None = None
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)

    @property
    def qweight(self) -> Tensor:
        """What stands for the weight where PEFT looks for the device and the dtype of a LoRA, and T5 for that to compute in."""
        some: Tensor = next(iter(self.packed[0].state_dict().values()))
        return some.new_empty(0, dtype=self.dtype)

    @property
    def scale_groups(self) -> int:
        """Scales of each output; 0 where the weight is on no grid."""
        return int(getattr(self.packed[0], "scale_groups", 0))

    def rescale(self, ratio: Tensor | None) -> None:
        """From now on compute with scale * (1 + ratio), ratio [out, scale_groups]; None: with the base's own scales."""
        self.ratio = None if ratio is None else (ratio,)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows `ids` of W [len(ids), in], of a head."""
        (layer,) = self.packed
        assert isinstance(layer, PackedLinear)
        return layer.rows(ids, layer.dtype).to(dtype)

    def dense(self, dtype: torch.dtype, ratio: Tensor | None = None) -> nn.Module:
        """The dense view, for one call."""
        made = self.view(dtype)
        bias: Tensor | None = made._parameters.get("bias")
        if bias is not None:
            made.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
        if isinstance(made, GridLinear):
            made.rescale(ratio)
        return made

    def in_pieces(self) -> bool:
        """Whether W is read some rows at a time."""
        (layer,) = self.packed
        if not isinstance(layer, PackedLinear) or layer.packing.sparse or layer.packing.outliers:
            return False
        return self.out_features > ROWS and isinstance(layer.weight, nn.Parameter) and not layer._modules

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], computed in the dtype of `x`."""
        if self.ratio is not None:
            out: Tensor = _Rescaled.apply(x, self.ratio[0], self)  # type: ignore[no-untyped-call]
        elif self.in_pieces():
            bias = self.packed[0].bias
            pieces = torch.arange(self.out_features, device=x.device).split(ROWS)
            out = torch.cat([_Product.apply(x, self, ids) for ids in pieces], -1)  # type: ignore[no-untyped-call]
            out = out if bias is None else out + bias.to(x.dtype)
        else:
            out = _Product.apply(x, self, None)  # type: ignore[no-untyped-call]
        return out

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> UnpackingLinear:
        """Move, or change the dtype."""
        self.packed[0]._apply(fn, recurse)  # the ratio is a parameter of `TaskScales`, which moves it
        moved: UnpackingLinear = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return moved

    def extra_repr(self) -> str:
        """Shape and packing, as `print(model)` shows them."""
        return self.packed[0].extra_repr()


class _Product(torch.autograd.Function):
    """x W^T + b, or x times some rows of W; nothing but the layer is kept for dL/dx."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: UnpackingLinear, ids: Tensor | None) -> Tensor:
        """[..., in] -> [..., out]."""
        ctx.layer, ctx.ids = layer, ids
        if ids is not None:
            return F.linear(x, layer.rows(ids, x.dtype))
        out: Tensor = layer.dense(x.dtype)(x)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """dL/dx = dL/dy W."""
        layer, ids = ctx.layer, ctx.ids
        weight = layer.dense(grad.dtype).weight if ids is None else layer.rows(ids, grad.dtype)
        flat = grad.reshape(-1, grad.shape[-1]) @ weight  # as torch does it: other shapes round otherwise
        return flat.view(*grad.shape[:-1], -1), None, None


class _Rescaled(torch.autograd.Function):
    """The product with a task's scales, computed again for its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ratio: Tensor, layer: UnpackingLinear) -> Tensor:
        """[..., in] -> [..., out]."""
        ctx.layer = layer
        ctx.save_for_backward(x, ratio)
        out: Tensor = layer.dense(x.dtype, ratio)(x)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Those of the dense view."""
        x, ratio = (tensor.detach().requires_grad_() for tensor in ctx.saved_tensors)
        with torch.enable_grad():
            out = ctx.layer.dense(x.dtype, ratio)(x)
        return *torch.autograd.grad(out, (x, ratio), grad), None
