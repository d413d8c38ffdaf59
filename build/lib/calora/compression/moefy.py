"""MoEfication: split each feed-forward into experts of neurons that fire together, with a router (arXiv 2110.01786).

A gated feed-forward (SwiGLU) is not sparse as a ReLU one is: its busiest neurons become shared experts that are always
on (as in arXiv 2502.04416), and only the rest is routed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from calora.compression.options import FIX, Plan, one_of, share, whole
from calora.compression.walk import Block, Change
from calora.errors import CaloraError
from calora.layers.experts import Experts, Routing, activation_of
from calora.layers.layout import dense_layer, rows_of
from calora.models.anatomy import FeedForward, feed_forward, stacks

FEATURES = 256  # random projections of a neuron's activity over tokens; distances stay within a few percent
ROUNDS = 20  # of k-means
ROUTER_STEPS, ROUTER_LR, ROUTER_DECAY = 300, 3e-3, 0.1


@dataclass(frozen=True)
class Options:
    """Options of `moefy`.

    Args:
        experts: number of experts that a feed-forward is split into, shared ones included; it divides the neurons.
        shared: of these, the always-on ones: the busiest neurons.
        active: share of all experts (shared included) that a token uses, above 0 and below 1.
        clustering: `coactivation` (neurons that fire on the same tokens) or `parameters` (alike input weights).
        router: `learned` (a low-rank linear map, trained to tell the experts with the most output energy) or `analytic`
            (the activity of the neuron nearest to each expert's centre).
        threshold: None chooses the best `active` ones; else an expert is used only where its score is above this.
    """

    experts: int
    active: float
    clustering: str
    router: str
    shared: int = 0
    threshold: float | None = None

    def __post_init__(self) -> None:
        whole("moefy.experts", self.experts, 2)
        whole("moefy.shared", self.shared, 0)
        share("moefy.active", self.active)
        one_of("moefy.clustering", self.clustering, ("coactivation", "parameters"))
        one_of("moefy.router", self.router, ("learned", "analytic"))
        if self.threshold is not None and not isinstance(self.threshold, int | float):
            raise CaloraError("moefy.threshold", "a number, or nothing", repr(self.threshold), FIX)
        if self.shared + 1 > round(self.active * self.experts):
            raise CaloraError(
                "moefy.shared", f"fewer than the {round(self.active * self.experts)} active experts", self.shared, FIX
            )


def check(model: PreTrainedModel, options: Options) -> None:
    """Raise `CaloraError` if a feed-forward cannot be replaced, or the experts do not divide its neurons."""
    for stack, blocks in stacks(model).items():
        for index, block in enumerate(blocks):
            part = feed_forward(f"{stack}.{index}", block)
            dense = model.get_submodule(part.name)
            if isinstance(dense, Experts):
                raise CaloraError(f"moefy {part.name}", "a dense feed-forward", "experts", "moefy a model once")
            if dense is block:
                found = f"one whose layers {type(block).__name__} holds itself"
                raise CaloraError(f"moefy {part.name}", "a feed-forward that is a module", found, "leave `moefy` out")
            activation_of(dense)
            layer = model.get_submodule(part.output)
            assert isinstance(layer, nn.Linear)
            neurons, of = layer.in_features, f"the neurons of {part.name}"
            if options.experts > neurons:
                raise CaloraError("moefy.experts", f"at most {neurons}, {of}", options.experts, FIX)
            if neurons % options.experts:
                raise CaloraError("moefy.experts", f"a divisor of {neurons}, {of}", options.experts, FIX)


def change(block: Block, options: Options, plan: Plan) -> Change:
    """Split the feed-forward into experts; its weights stay, in another order."""
    part: FeedForward = feed_forward(block.name, block.module)
    layers = block.layers
    reader = layers[part.output]
    neurons, size = reader.in_features, reader.in_features // options.experts
    # x: [tokens, d], hidden: [tokens, neurons]
    x, hidden = (values.float() for values in block.inputs(part.inputs[0], part.output))
    energy = hidden.square() * reader.weight.detach().float().square().sum(0)  # [tokens, neurons]: of each one's output
    shared = _busiest(energy, options.shared * size)
    places = torch.arange(neurons, device=shared.device)
    routed = places[~torch.isin(places, shared)]
    if options.clustering == "coactivation":
        features = project(energy[:, routed].sqrt().T)
    else:
        features = torch.cat([layers[name].weight.detach().float()[routed] for name in part.inputs], dim=1)
    count = options.experts - options.shared
    clusters, centres = balanced_clusters(features, count)  # [experts, size], [experts, f]
    order = torch.cat([shared, routed[clusters.flatten()]])  # [neurons]
    target = energy[:, routed[clusters.flatten()]].view(len(x), count, size).sum(-1)  # [tokens, experts]
    active = round(options.active * options.experts) - options.shared
    if options.router == "learned":
        tensors = learned_router(x, target, active)
    else:
        near = F.normalize(features, dim=1)[clusters] @ centres.unsqueeze(-1)  # [experts, size, 1]
        nearest = routed[clusters.gather(1, near.squeeze(-1).argmax(1, keepdim=True)).flatten()]
        tensors = [layers[name].weight.detach()[nearest] for name in part.inputs]
    made = Change()
    for name in part.inputs:
        made.modules[name] = rows_of(layers[name], order)
        made.kept[f"{name}.rows"] = order.int()
    made.modules[part.output] = dense_layer(reader.weight[:, order].clone(), reader.bias)
    made.kept[f"{part.output}.columns"] = order.int()
    names = tuple(name.rsplit(".", 1)[-1] for name in (*part.inputs, part.output))
    routing = Routing(names[:-1], names[-1], count, options.shared, size, active, options.threshold, options.router)
    stored = {f"router.{i}": tensor.to(block.dtype) for i, tensor in enumerate(tensors)}
    dense = block.module.get_submodule(part.name.removeprefix(f"{block.name}."))
    experts = Experts.wrap(dense, vars(routing), stored)
    made.modules = {part.name: experts, **made.modules}  # the layers go into the new feed-forward
    made.notes[part.name] = _held(experts, x, target, energy[:, shared].sum(-1)) | {
        "activation": type(activation_of(dense)).__name__
    }
    return made


def _held(experts: Experts, x: Tensor, target: Tensor, shared: Tensor) -> dict[str, Any]:
    """Share of the neurons' output energy that the chosen experts hold, by the router and by the best choice."""
    with torch.no_grad():
        chosen = experts.choose(x)  # [tokens, active]
    whole = (target.sum(-1) + shared).clamp_min(1e-30)
    best = target.topk(experts.routing.active, dim=-1).values.sum(-1)
    used = torch.zeros_like(target).scatter_(
        -1, chosen, 1.0
    )  # each once: places that a threshold leaves empty repeat one
    found = (target * used).sum(-1)
    return {
        "energy": round(float(((found + shared) / whole).mean()), 4),
        "energy_of_the_best": round(float(((best + shared) / whole).mean()), 4),
    }


def _busiest(energy: Tensor, count: int) -> Tensor:
    """The neurons that hold the largest share of a token's energy, on average over tokens."""
    share_of = (energy / energy.sum(1, keepdim=True).clamp_min(1e-30)).mean(0)
    return share_of.topk(count).indices.sort().values


def project(activity: Tensor) -> Tensor:
    """Random projection [neurons, tokens] -> [neurons, FEATURES] that keeps angles (Johnson-Lindenstrauss)."""
    if activity.shape[1] <= FEATURES:
        return activity
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(activity.shape[1], FEATURES, generator=generator) / FEATURES**0.5
    return torch.mm(activity, directions.to(activity.device))


def balanced_clusters(features: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Spherical k-means with clusters of equal size.

    Args:
        features: [n, f]; `count` divides n.

    Returns:
        Members [count, n / count] and unit centres [count, f].
    """
    unit = F.normalize(features, dim=1)
    generator = torch.Generator().manual_seed(0)
    centres = unit[torch.randperm(len(unit), generator=generator)[:count]]
    members = torch.empty(0, device=unit.device)
    for _ in range(ROUNDS):
        members = _assign(unit @ centres.T)
        centres = F.normalize(unit[members].mean(1), dim=1)
    return members, centres


def _assign(similarity: Tensor) -> Tensor:
    """Members [k, n / k]: each proposes to the nearest cluster that has not refused it; a full one keeps its nearest."""
    n, count = similarity.shape  # [n, clusters]
    size = n // count
    wish = similarity.clone()
    while True:
        chosen = wish.argmax(1)  # [n]
        crowd = torch.bincount(chosen, minlength=count)  # [clusters]
        if int(crowd.max()) <= size:
            break
        for cluster in (crowd > size).nonzero().flatten().tolist():
            own = (chosen == cluster).nonzero().flatten()  # [members], more than fit
            refused = own[similarity[own, cluster].argsort(descending=True)[size:]]
            wish[refused, cluster] = -torch.inf
    return chosen.argsort(stable=True).view(count, size)


def learned_router(x: Tensor, target: Tensor, active: int) -> list[Tensor]:
    """Down [r, d], up [experts, r] and bias [experts] of a low-rank map, trained to find the `active` best experts.

    Args:
        x: inputs of the feed-forward, [tokens, d].
        target: output energy of each expert, [tokens, experts].
    """
    labels = torch.zeros_like(target).scatter_(-1, target.topk(active, dim=-1).indices, 1.0)
    generator = torch.Generator().manual_seed(0)
    rank = min(x.shape[1], 64)
    scale = x.square().mean().sqrt().clamp_min(1e-12)
    start = torch.randn(rank, x.shape[1], generator=generator) / x.shape[1] ** 0.5
    down = start.to(x.device).requires_grad_()
    up = torch.zeros(target.shape[1], rank, device=x.device).requires_grad_()
    bias = torch.logit(labels.mean(0).clamp(0.01, 0.99)).requires_grad_()
    optimizer = torch.optim.AdamW([down, up, bias], lr=ROUTER_LR, weight_decay=ROUTER_DECAY)
    scaled = x / scale
    with torch.enable_grad():
        for _ in range(ROUTER_STEPS):
            index = torch.randint(len(x), (min(512, len(x)),), generator=generator).to(x.device)
            loss = F.binary_cross_entropy_with_logits(F.linear(F.linear(scaled[index], down), up, bias), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return [down.detach() / scale, up.detach(), bias.detach()]
