"""Any layer of a compressed model as a JSON entry and its tensors, and back."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from calora.layers.experts import ExpertLinear, Experts
from calora.layers.nf4 import Nf4Linear
from calora.layers.ongrid import GridLinear
from calora.layers.packed import PackedEmbedding, PackedLinear, Packing, ScaledEmbedding
from calora.layers.unpacking import UnpackingLinear
from calora.recovery.shared import CHILD, SharedRecovery, attach_shared, read_once, shared_of


def store(layer: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(entry, tensors) of a layer."""
    if isinstance(layer, Experts):
        return {"kind": "experts", **layer.describe()}, layer.tensors()
    tensors = {name: tensor.detach() for name, tensor in layer.state_dict().items()}
    dtype: dict[str, Any] = {
        "dtype": str(getattr(layer, "dtype", None) or layer.get_parameter("weight").dtype).removeprefix("torch.")
    }
    if isinstance(layer, PackedEmbedding):
        shape = {"rows": layer.num_embeddings, "width": layer.embedding_dim, "padding": layer.padding_idx}
        factor = {} if layer.factor is None else {"factor": layer.factor}
        return {"kind": "embedding", "format": layer.format, **shape, **dtype, **factor}, tensors
    assert isinstance(layer, nn.Linear)
    recovery = shared_of(layer)
    if recovery is not None:
        dtype |= {"recovery": recovery.describe()}
    if isinstance(layer, PackedLinear):
        return {"kind": "packed", **layer.describe(), **dtype}, tensors
    kind = {"kind": "nf4", "format": "nf4"} if isinstance(layer, Nf4Linear) else {"kind": "dense", "format": "native"}
    return {**kind, "in": layer.in_features, "out": layer.out_features, **dtype}, tensors


def restore(old: nn.Module, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    """The layer that `store` described; `old` is what stands in its place."""
    if entry["kind"] == "experts":
        return Experts.wrap(old, entry, dict(tensors))
    if "recovery" in entry:
        inside, outside = parted(tensors)
        whole = restore(old, {key: value for key, value in entry.items() if key != "recovery"}, outside)
        attach_shared(whole, SharedRecovery().restore(inside))
        return whole
    dtype = getattr(torch, entry["dtype"])
    if entry["kind"] == "nf4":
        return Nf4Linear(entry["in"], entry["out"], dtype).restore(tensors)
    if entry["kind"] == "embedding":
        sizes = (entry["rows"], entry["width"], entry["padding"])
        return PackedEmbedding(*sizes, dtype, entry.get("factor"), entry["format"]).restore(tensors)
    if entry["kind"] == "dense":
        weight = tensors["weight"]
        return dense_layer(weight.T.contiguous() if entry.get("conv1d") else weight, tensors.get("bias"))
    return packed(entry).restore(tensors)


def parted(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of a layer's recovery, by its own names, and those of the layer."""
    prefix = f"{CHILD}."
    inside = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return inside, {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}


def packed(entry: Mapping[str, Any]) -> PackedLinear:
    """A packed layer, still without its tensors."""
    packing = Packing(entry["format"], entry["sparse"], entry["group"], entry["symmetric"], entry["outliers"])
    return PackedLinear(entry["in"], entry["out"], packing, getattr(torch, entry["dtype"]))


def build(
    model: nn.Module,
    entries: Mapping[str, Mapping[str, Any]],
    tensors: Mapping[str, Tensor],
    tied: Mapping[str, str],
    dense: bool = False,
    ready: bool = False,
    trainable: bool = False,
    compute: torch.dtype | None = None,
) -> None:
    """Fill an empty model with stored tensors, layer by layer.

    Args:
        entries: layer -> entry of `store`.
        tied: name of a tensor -> name under which the same one is stored.
        dense: unpack each layer.
        ready: bring each layer into the form that a CPU computes with.
        trainable: unpack the weight of a packed layer in each call, in the backward pass too.
        compute: the dtype of the inputs to come, where it is not the stored one.
    """
    names = {name: name for name in tensors} | dict(tied)  # name in the model -> name on disk
    # Read once, so that they stay one tensor. Recoveries first: between what layers give up they would leave holes in the heap.
    early = {name: tensors[name] for name in tensors if f".{CHILD}." in name}

    def read(name: str) -> Tensor:
        stored = names[name]
        if stored in tied.values() and stored not in early:
            early[stored] = tensors[stored]
        return early[stored] if stored in early else tensors[stored]

    # layer -> (codes [out, in],) of a sparse int8 layer, or (layout [out, in / 2], scales [groups, out, 2]) of an int4 one
    rooms = {
        layer: packed(entry).room(compute) for layer, entry in entries.items() if ready and entry["kind"] == "packed"
    }
    done: set[str] = set()
    for layer in sorted(entries, reverse=True):  # a feed-forward of experts comes after the layers in it
        own = [name for name in names if name.startswith(f"{layer}.") and name not in done]
        done |= set(own)
        made = restore(model.get_submodule(layer), entries[layer], {name[len(layer) + 1 :]: read(name) for name in own})
        dtype: torch.dtype = compute or getattr(torch, entries[layer].get("dtype", "float32"))
        if dense and not isinstance(made, Experts):
            made = dense_view(made, dtype)
        elif trainable and isinstance(made, PackedLinear | Nf4Linear):
            made = UnpackingLinear(made, partial(dense_view, made), dtype)
        elif ready and isinstance(made, PackedLinear):
            made.prepare(rooms.pop(layer))
        elif ready and (isinstance(made, Experts) or (isinstance(made, Nf4Linear) and compute in (None, made.dtype))):
            made.prepare()
        if isinstance(made, PackedEmbedding) and compute:
            made.dtype = compute
        model.set_submodule(layer, made)
    model.load_state_dict({name: read(name) for name in names if name not in done}, strict=False, assign=True)
    read_once(model)


def prepare(model: nn.Module) -> None:
    """Bring every packed layer, then every feed-forward of experts, into the form that a CPU computes with."""
    rooms = {module: module.room() for module in model.modules() if isinstance(module, PackedLinear)}
    for layer in list(rooms):
        layer.prepare(rooms.pop(layer))
    for kind in (Nf4Linear, Experts):
        for module in list(model.modules()):
            if isinstance(module, kind):
                module.prepare()


def prepared(layer: nn.Module) -> bool:
    """Whether a layer is not in its stored form: in that of a CPU, with the scales of a task, or to train beside."""
    if isinstance(layer, Experts):
        return layer.choice is not None
    if isinstance(layer, SharedRecovery):
        return layer.unpacked
    if isinstance(layer, UnpackingLinear):
        return True
    exchanged = isinstance(layer, PackedLinear) and layer.exchanged is not None
    return exchanged or isinstance(layer, ExpertLinear) or bool(getattr(layer, "kernel", None))


def dense_layer(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A frozen `nn.Linear` with this weight [out, in] and bias."""
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer


def rows_of(layer: nn.Linear, rows: Tensor) -> nn.Linear:
    """A dense layer with some outputs of another, in the order of `rows`."""
    return dense_layer(layer.weight[rows].clone(), None if layer.bias is None else layer.bias[rows].clone())


def dense_weight(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """The dense view of any layer's weight, with its recovery."""
    recovery = shared_of(layer)
    if recovery is not None:
        return (own_weight(layer, torch.float32) + recovery.weight()).to(dtype)
    return own_weight(layer, dtype)


def own_weight(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """The dense view of any layer's weight, without its recovery."""
    if isinstance(layer, PackedLinear | PackedEmbedding | Nf4Linear | ExpertLinear):
        return layer.dense_weight(dtype)
    return layer.get_parameter("weight").detach().to(dtype)


def dense_view(layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A dense layer with the same values; of one on a grid a task can still train the scales."""
    weight = dense_weight(layer, dtype)
    if isinstance(layer, nn.Embedding):
        factor: float | None = getattr(layer, "factor", None)
        if factor is not None:
            return ScaledEmbedding(weight, layer.padding_idx, factor).requires_grad_(False)
        rows, width = weight.shape
        return nn.Embedding(rows, width, padding_idx=layer.padding_idx, _weight=weight).requires_grad_(False)
    if isinstance(layer, PackedLinear) and layer.scale_groups:
        return GridLinear(layer, weight)
    assert isinstance(layer, nn.Linear)
    return dense_layer(weight, layer.bias)
