"""The recovery module of the paper: R(X) = sigma(X D) U, beside a linear layer (arXiv 2307.07705, section 3.3)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from calora.errors import CaloraError

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "identity": lambda x: x,
}
CHILD = "recovery"  # under this name a linear layer holds its bypasses, one an adapter


class RecoveryBypass(nn.Module):
    """Low-rank bypass R(X) = sigma(X D) U.

    D is `down` [in, rank], U is `up` [rank, out]. U starts at zero, so that a new bypass is an exact no-op.

    Args:
        in_features, out_features: widths of the linear layer that it stands beside.
        rank: 1 <= rank <= min(in_features, out_features).
        activation: `gelu`, `relu`, `silu` or `identity` (sigma).

    Raises:
        CaloraError: the rank or the activation is outside its range.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, activation: str) -> None:
        super().__init__()
        widest = min(in_features, out_features)
        if not 1 <= rank <= widest:
            raise CaloraError(
                "rank of the bypass", f"1 to {widest} (the layer's width)", rank, "choose a rank in that range"
            )
        if activation not in ACTIVATIONS:
            raise CaloraError("activation", f"one of {', '.join(ACTIVATIONS)}", activation, "choose one of them")
        self.activation = activation
        self.down = nn.Parameter(torch.randn(in_features, rank) / in_features**0.5)
        self.up = nn.Parameter(torch.zeros(rank, out_features))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], in the dtype of the parameters, returned in that of `x`."""
        hidden = ACTIVATIONS[self.activation](x.to(self.down.dtype) @ self.down)
        recovered: Tensor = hidden @ self.up
        return recovered.to(x.dtype)

    def beside(self, output: Tensor, x: Tensor) -> Tensor:
        """output + R(x), the sum taken within the last product."""
        x, width = x.to(self.down.dtype), self.down.shape[0]
        # one token: a product with a vector is several times faster than with a row
        read = torch.mv(self.down.T, x.reshape(-1)) if x.numel() == width else x.reshape(-1, width) @ self.down
        return plus_product(output, ACTIVATIONS[self.activation](read), self.up)

    def extra_repr(self) -> str:
        """Shapes, as `print(model)` shows them."""
        return f"{self.down.shape[0]} -> {self.down.shape[1]} -> {self.up.shape[1]}, {self.activation}"


def plus_product(output: Tensor, hidden: Tensor, up: Tensor) -> Tensor:
    """output + hidden U, the sum taken within the product; in place where no gradient is kept.

    Args:
        output: [..., out].
        hidden: [n, k], or [k] of one token.
        up: U [k, out].
    """
    if output.dtype != hidden.dtype:
        return output + (hidden @ up).to(output.dtype).view(output.shape)
    keeps_gradient = torch.is_grad_enabled()
    if hidden.dim() == 1:
        flat = output.reshape(-1)
        out = torch.addmv(flat, up.T, hidden) if keeps_gradient else flat.addmv_(up.T, hidden)
    else:
        flat = output.reshape(-1, up.shape[1])
        out = torch.addmm(flat, hidden, up) if keeps_gradient else flat.addmm_(hidden, up)
    return out.view(output.shape)


class Bypasses(nn.ModuleDict):
    """The bypasses of one linear layer, by adapter name; only the active one is applied."""

    active: str | None = None
    hook: RemovableHandle

    @property
    def current(self) -> RecoveryBypass | None:
        """The active bypass."""
        found: Any = self._modules.get(self.active or "")
        bypass: RecoveryBypass | None = found
        return bypass


def _add_bypass(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    bypasses: Any = layer._modules[CHILD]  # not by getattr, which is slow: this runs for each token
    bypass: RecoveryBypass | None = bypasses.current
    return output if bypass is None else bypass.beside(output, args[0])


def attach(layer: nn.Module, name: str, bypass: RecoveryBypass) -> None:
    """Put `bypass` beside `layer`: from now on layer(x) is its own output + R(x) whenever `name` is active.

    Works with any module that maps [..., in] to [..., out]: dense, quantised, or already wrapped by PEFT.
    A forward hook adds it, so no weight and no parameter name of `layer` changes.
    """
    if not hasattr(layer, CHILD):
        layer.add_module(CHILD, Bypasses())
        getattr(layer, CHILD).hook = layer.register_forward_hook(_add_bypass)
    bypasses: Bypasses = getattr(layer, CHILD)
    bypasses[name] = bypass


def detach(model: nn.Module, name: str) -> None:
    """Take the bypasses called `name` off; a layer without any other is as it was before the first."""
    for layer in list(model.modules()):
        bypasses = layer._modules.get(CHILD)
        if isinstance(bypasses, Bypasses) and name in bypasses:
            del bypasses[name]
            if not bypasses:
                bypasses.hook.remove()
                delattr(layer, CHILD)


def bypasses_of(model: nn.Module) -> Iterator[tuple[str, Bypasses]]:
    """All (layer name, bypasses) of a model; PEFT's own wrapping does not show in the layer name."""
    for name, module in model.named_modules():
        if isinstance(module, Bypasses):
            yield name.removesuffix(f".{CHILD}").removesuffix(".base_layer"), module


def activate(model: nn.Module, name: str | None) -> None:
    """Make the bypasses called `name` the active ones everywhere; None switches all off."""
    for _, bypasses in bypasses_of(model):
        bypasses.active = name


def recovery_state(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The tensors of adapter `name`: `<layer>.down` [in, rank] and `<layer>.up` [rank, out]."""
    return {
        f"{layer}.{part}": tensor.detach()
        for layer, bypasses in bypasses_of(model)
        if name in bypasses
        for part, tensor in bypasses[name].state_dict().items()
    }
