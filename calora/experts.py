"""A feed-forward split into experts: a router chooses a few for each token, and only their neurons count.

Neurons are stored expert by expert, the always-on ones first, in the layers that the dense feed-forward had: adapters
find them under the same names. One token alone (decoding) computes only the chosen rows; more are masked, which is the
same function.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calora.errors import CaloraError
from calora.packed import PackedLinear, Packing, kernel_takes


@dataclass(frozen=True)
class Routing:
    """How tokens are routed.

    Args:
        inputs: names of the layers that make the neurons; of two the first goes through the activation.
        output: name of the layer that reads them.
        experts: number of experts that are routed to.
        shared: number of experts of the same size that are always on.
        size: neurons of one expert.
        active: `top_k`: experts chosen for each token; `threshold`: the most that may be.
        threshold: None for `top_k`; else an expert is chosen where its score is above it, the best one always.
        router: `learned` (score = x A^T B^T + b) or `analytic` (the activity of one representative neuron an expert).
    """

    inputs: tuple[str, ...]
    output: str
    experts: int
    shared: int
    size: int
    active: int
    threshold: float | None
    router: str


class Experts(nn.Module):
    """The feed-forward with its router. Wrap an existing one with `wrap`."""

    routing: Routing
    act: nn.Module
    router: nn.ParameterList

    @classmethod
    def wrap(cls, dense: nn.Module, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Experts:
        """Take the layers and the activation of a dense feed-forward whose neurons are in expert order.

        Args:
            entry: the fields of `Routing`.
            tensors: of the router: `router.0` and on, as `Routing.router` says.
        """
        made = cls()
        fields = {name: entry[name] for name in Routing.__dataclass_fields__}
        made.routing = Routing(**{**fields, "inputs": tuple(fields["inputs"])})
        for name in (*made.routing.inputs, made.routing.output):
            setattr(made, name, getattr(dense, name))
        made.act = activation_of(dense)
        made.router = nn.ParameterList(
            [nn.Parameter(tensors[f"router.{i}"], requires_grad=False) for i in range(len(tensors))]
        )
        return made

    def describe(self) -> dict[str, Any]:
        """The entry of `wrap`."""
        return {**asdict(self.routing), "inputs": list(self.routing.inputs)}

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of `wrap`."""
        return {f"router.{i}": tensor.detach() for i, tensor in enumerate(self.router)}

    def scores(self, x: Tensor) -> Tensor:
        """What the router thinks of each expert: [..., d] -> [..., experts]."""
        if self.routing.router == "learned":
            down, up, bias = (tensor.to(x.dtype) for tensor in self.router)
            return F.linear(F.linear(x, down), up, bias)
        activity: Tensor = self.act(F.linear(x, self.router[0].to(x.dtype)))
        if len(self.router) > 1:
            activity = activity * F.linear(x, self.router[1].to(x.dtype))
        return activity.abs()

    def choose(self, x: Tensor) -> Tensor:
        """Indices of the chosen experts, [..., active]; unused places repeat the best one."""
        best = self.scores(x).topk(self.routing.active, dim=-1)
        if self.routing.threshold is None:
            return best.indices
        used = best.values > self.routing.threshold
        return torch.where(used, best.indices, best.indices[..., :1])

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., d]."""
        routing = self.routing
        chosen = self.choose(x)
        skipping = x.numel() == x.shape[-1] and self._skip(chosen.flatten())
        try:
            hidden = self.act(getattr(self, routing.inputs[0])(x))
            for name in routing.inputs[1:]:
                hidden = hidden * getattr(self, name)(x)
            mask = torch.zeros(*x.shape[:-1], routing.experts, dtype=hidden.dtype, device=x.device).scatter_(
                -1, chosen, 1.0
            )
            mask = torch.cat([mask.new_ones(*x.shape[:-1], routing.shared), mask], dim=-1)
            hidden = hidden * mask.repeat_interleave(routing.size, dim=-1)
            out: Tensor = getattr(self, routing.output)(hidden)
        finally:
            if skipping:
                self._skip(None)
        return out

    def _skip(self, chosen: Tensor | None) -> bool:
        """Tell the layers which experts are computed (None: all); False where they cannot skip."""
        layers = [base_of(getattr(self, name)) for name in (*self.routing.inputs, self.routing.output)]
        if not all(isinstance(layer, ExpertLinear) for layer in layers):
            return False
        if chosen is not None:
            shared = torch.arange(self.routing.shared, device=chosen.device)
            chosen = torch.cat([shared, chosen.unique() + self.routing.shared])
        for layer in layers:
            assert isinstance(layer, ExpertLinear)
            layer.chosen = chosen
        return True

    def prepare(self) -> None:
        """Put the layers into the form in which a single token skips the experts that were not chosen."""
        for name in (*self.routing.inputs, self.routing.output):
            layer = getattr(self, name)
            if ExpertLinear.takes(layer):
                setattr(
                    self,
                    name,
                    ExpertLinear(layer, self.routing.experts + self.routing.shared, name == self.routing.output),
                )

    def extra_repr(self) -> str:
        """The routing, as `print(model)` shows it."""
        r = self.routing
        return f"{r.active} of {r.experts} experts of {r.size} neurons, {r.shared} shared, {r.router} router"


def activation_of(dense: nn.Module) -> nn.Module:
    """The activation of a feed-forward of transformers."""
    for name in ("act_fn", "act"):
        if hasattr(dense, name):
            found: nn.Module = getattr(dense, name)
            return found
    raise CaloraError(
        type(dense).__name__, "a feed-forward with act or act_fn", "none", "leave `moefy` out for this base"
    )


def base_of(layer: nn.Module) -> nn.Module:
    """The layer below PEFT's wrapping."""
    return getattr(layer, "base_layer", layer)


class ExpertLinear(nn.Linear):
    """A layer whose rows (or, reading neurons, columns) are experts; computes only the `chosen` ones when told.

    Values lie expert by expert in memory, so that an expert is one contiguous copy: [experts, size, width], in the
    base's dtype or as int8 codes. The rest of an output is 0 (rows), the rest of an input is not read (columns).
    """

    def __init__(self, layer: nn.Linear, experts: int, columns: bool) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.columns = layer.in_features, layer.out_features, columns
        self.chosen: Tensor | None = None
        packed = isinstance(layer, PackedLinear)
        values = layer.weight.detach()
        self.scale = layer.get_buffer("weight_scale").flatten() if packed else None
        if columns:
            values = values.T.contiguous()
        self.weight = nn.Parameter(values.view(experts, -1, values.shape[1]), requires_grad=False)
        self.bias = layer.bias
        self.dtype: torch.dtype = layer.dtype if isinstance(layer, PackedLinear) else layer.weight.dtype

    @staticmethod
    def takes(layer: nn.Module) -> bool:
        """True for a dense layer, and for dense int8 codes without outlier columns."""
        if isinstance(layer, PackedLinear):
            return layer.packing == Packing("int8", group=layer.in_features)
        return type(layer) is nn.Linear

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """W [out, in] in `dtype`."""
        values = self.weight.detach().flatten(0, 1)
        if self.columns:
            values = values.T
        return (
            values.to(dtype)
            if self.scale is None
            else (values.float() * self.scale.float().unsqueeze(1)).to(self.dtype).to(dtype)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        values = (self.weight if self.chosen is None else self.weight.index_select(0, self.chosen)).flatten(0, 1)
        scale = None if self.scale is None else self.scale.to(x.dtype)
        if self.columns:
            if self.chosen is not None:
                x = x.view(len(self.weight), -1).index_select(0, self.chosen).view(*x.shape[:-1], -1)
            out = x @ values.to(x.dtype)
            out = out if scale is None else out * scale
        elif self.chosen is None:
            out = F.linear(x, values.to(x.dtype))
            out = out if scale is None else out * scale
        else:
            if scale is None:
                some = F.linear(x, values).view(len(self.chosen), -1)
            else:
                size = self.weight.shape[1]
                own = scale.view(-1, size).index_select(0, self.chosen)
                flat = x.reshape(1, -1)
                if kernel_takes(values, flat):
                    some = torch._weight_int8pack_mm(flat, values, own.flatten())
                else:
                    some = F.linear(flat, values.to(x.dtype)) * own.flatten()
                some = some.view(len(self.chosen), size)
            out = x.new_zeros(len(self.weight), self.weight.shape[1])
            out = out.index_copy_(0, self.chosen, some).view(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias.to(x.dtype)

    def extra_repr(self) -> str:
        """Shape and packing, as `print(model)` shows them."""
        return f"{self.in_features} -> {self.out_features}, {len(self.weight)} experts"
