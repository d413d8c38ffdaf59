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
from calora.layers.codes import Grid
from calora.layers.packed import PackedLinear, Packing, kernel_takes
from calora.recovery.shared import attach_shared, shared_of


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
    choice: Choice | None = None  # of a prepared feed-forward

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
        chosen = self.choose(x) + routing.shared
        one_token = x.numel() == x.shape[-1]
        if one_token and self.choice:
            self.choice.take(self._used(chosen.flatten()))
        try:
            hidden = self.act(getattr(self, routing.inputs[0])(x))
            for name in routing.inputs[1:]:
                hidden = hidden * getattr(self, name)(x)
            # Adapters write to the neurons of all experts: those that were not chosen are silent all the same.
            mask = hidden.new_zeros(*x.shape[:-1], routing.shared + routing.experts).scatter_(-1, chosen, 1.0)
            if routing.shared:
                mask[..., : routing.shared] = 1.0
            hidden = (hidden.unflatten(-1, (-1, routing.size)) * mask.unsqueeze(-1)).flatten(-2)
            out: Tensor = getattr(self, routing.output)(hidden)
        finally:
            if self.choice:
                self.choice.experts = None
        return out

    def _used(self, chosen: Tensor) -> Tensor:
        """The experts that one token uses, each once, with the shared ones."""
        if self.routing.threshold is not None:
            chosen = chosen.unique()
        if self.routing.shared:
            chosen = torch.cat([torch.arange(self.routing.shared, device=chosen.device), chosen])
        return chosen

    def prepare(self) -> None:
        """Put the layers into the form in which a single token skips the experts that were not chosen."""
        self.choice = Choice(self.routing.experts + self.routing.shared, self.routing.size)
        for name in (*self.routing.inputs, self.routing.output):
            layer = getattr(self, name)
            if ExpertLinear.takes(layer):
                made, recovery = ExpertLinear(layer, self.choice, name == self.routing.output), shared_of(layer)
                if recovery is not None:
                    attach_shared(made, recovery)
                setattr(self, name, made)

    def extra_repr(self) -> str:
        """The routing, as `print(model)` shows it."""
        r = self.routing
        return f"{r.active} of {r.experts} experts of {r.size} neurons, {r.shared} shared, {r.router} router"


def activation_of(dense: nn.Module) -> nn.Module:
    """The activation of a feed-forward of transformers."""
    for name in ("act_fn", "act", "activation_fn"):
        if hasattr(dense, name):
            found: nn.Module = getattr(dense, name)
            return found
    raise CaloraError(
        type(dense).__name__,
        "a feed-forward with act, act_fn or activation_fn",
        "none",
        "leave `moefy` out for this base",
    )


class Choice:
    """What the layers of one feed-forward compute at the moment; no module, whose attributes are slow to set."""

    def __init__(self, experts: int, size: int) -> None:
        self.size = size
        self.places = torch.arange(experts * size).view(experts, size)  # the neurons of each expert
        self.experts: Tensor | None = None  # None: all
        self.neurons = self.places[0]
        self.halves = torch.zeros(2, dtype=torch.long)

    def take(self, experts: Tensor) -> None:
        """Compute only these experts."""
        if self.places.device != experts.device:
            self.places, self.halves = self.places.to(experts.device), self.halves.to(experts.device)
        self.experts = experts
        self.neurons = self.places.index_select(0, experts).flatten()
        self.halves[1] = len(self.neurons) // 2


class ExpertLinear(nn.Linear):
    """A layer whose outputs (or, reading neurons, inputs) are the neurons of experts; one token computes the `chosen` ones.

    Values lie neuron by neuron in memory, [experts, size, width], in the base's dtype or as int8 codes: an expert is
    one contiguous piece. The rest of an output is 0, the rest of an input is not read.
    """

    trains_scales = False

    def __init__(self, layer: nn.Linear, choice: Choice, reads_neurons: bool) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.reads_neurons = layer.in_features, layer.out_features, reads_neurons
        self.choice = choice
        packed = isinstance(layer, PackedLinear)
        values = layer.weight.detach()
        self.own_scale = layer.get_buffer("weight_scale").flatten() if packed else None
        self.scale = self.own_scale
        if reads_neurons:
            values = values.T.contiguous()
        self.weight = nn.Parameter(values.view(-1, choice.size, values.shape[1]), requires_grad=False)
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
        if self.reads_neurons:
            values = values.T
        return (
            values.to(dtype)
            if self.scale is None
            else (values.float() * self.scale.float().unsqueeze(1)).to(self.dtype).to(dtype)
        )

    @property
    def scale_groups(self) -> int:
        """Scales of each output; 0 where the weight is on no grid."""
        return 0 if self.own_scale is None else 1

    def rescale(self, ratio: Tensor | None) -> None:
        """From now on w = code * scale * (1 + ratio), ratio [out, 1]; None: with the base's own scales."""
        self.scale = self.own_scale
        if ratio is not None and self.own_scale is not None:
            self.scale = Grid(self.own_scale, None, 8).rescaled(ratio.flatten()).scale

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if self.choice.experts is None:
            values = self.weight.flatten(0, 1).to(x.dtype)
            out = x @ values if self.reads_neurons else F.linear(x, values)
            out = out if self.scale is None else out * self.scale.to(x.dtype)
        else:
            one = self._read(x.flatten()) if self.reads_neurons else self._write(x.view(1, -1), self.choice.experts)
            out = one.view(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias.to(x.dtype)

    def _write(self, x: Tensor, experts: Tensor) -> Tensor:
        """The neurons of some experts for x [1, in]; [experts, size], 0 elsewhere."""
        values = self.weight.index_select(0, experts).flatten(0, 1)
        out = x.new_zeros(self.weight.shape[:2])
        if self.scale is None:
            some = F.linear(x, values.to(x.dtype))
        else:
            scale = self.scale.view(out.shape).index_select(0, experts).flatten().to(x.dtype)
            takes = kernel_takes(values, x)
            some = torch._weight_int8pack_mm(x, values, scale) if takes else F.linear(x, values.to(x.dtype)) * scale
        return out.index_copy_(0, experts, some.view(-1, out.shape[1]))

    def _read(self, x: Tensor) -> Tensor:
        """The sum of the chosen neurons' vectors, each times its x: x [in] -> [out]. A row is read where it lies."""
        neurons, table = self.choice.neurons, self.weight.flatten(0, 1)  # [chosen], [neurons, out]
        x = x.index_select(0, neurons)  # [chosen]
        if table.dtype != x.dtype:
            table, neurons = table.index_select(0, neurons).to(x.dtype), torch.arange(len(neurons), device=x.device)
        halves = F.embedding_bag(
            neurons, table, self.choice.halves, mode="sum", per_sample_weights=x
        )  # [2, out], one a core
        out = halves.sum(0)
        return out if self.scale is None else out * self.scale.to(x.dtype)

    def extra_repr(self) -> str:
        """Shape and packing, as `print(model)` shows them."""
        return f"{self.in_features} -> {self.out_features}, {len(self.weight)} experts"
