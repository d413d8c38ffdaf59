"""Fold what is linear beside a layer into one plain LoRA, which any LoRA runtime can serve: a LoRA, a bypass, the base's recovery."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calora.adapters.lora import Adapter, lora_scale, plain_config
from calora.errors import CaloraError
from calora.models.anatomy import linear_layers
from calora.recovery.shared import shared_of

Factors = dict[str, tuple[Tensor, Tensor]]  # layer -> A [r, in] and B [out, r] of B A, the scale in B, fp32


def fold(adapter: Adapter, beside: Adapter | None = None) -> Adapter:
    """Fold a linear bypass into the LoRA, exactly: s B A + (D U)^T = [s B, U^T] [A; D^T].

    The result is a plain LoRA of rank r + rank on the layers that had both, which any LoRA runtime can serve.

    Args:
        adapter: a LoRA, a linear bypass, or both.
        beside: another one to fold in, such as the base's recovery (`shared_lora`).

    Raises:
        CaloraError: the bypass is not linear (`activation` is not `identity`), or the adapter has scales.
    """
    found = factors(adapter)
    for layer, (more, up) in ({} if beside is None else factors(beside)).items():
        a, b = found.get(layer, (more[:0], up[:, :0]))
        found[layer] = torch.cat([a, more]), torch.cat([b, up], dim=1)
    return _plain(dict(sorted(found.items())))


def factors(adapter: Adapter) -> Factors:
    """A and B of each layer, its LoRA's first, then its bypass's; raises as `fold`."""
    if adapter.scales:
        scales = "scales of a grid, whose change of the weight has full rank: no LoRA holds it"
        raise CaloraError("fold", "a LoRA and a linear bypass", scales, "load the adapter's folder with calora")
    activation = adapter.meta.get("activation")
    if adapter.recovery and activation != "identity":
        raise CaloraError("fold", "activation: identity", activation, "train it with a linear bypass")
    found: Factors = {}
    for layer in sorted({*adapter.lora_layers, *adapter.bypass_layers}):
        rows, columns = [], []
        if adapter.config is not None and f"{layer}.lora_A.weight" in adapter.lora:
            a, b = adapter.lora[f"{layer}.lora_A.weight"].float(), adapter.lora[f"{layer}.lora_B.weight"].float()
            rows.append(a)
            columns.append(b * lora_scale(adapter.config, layer))
        if f"{layer}.down" in adapter.recovery:
            rows.append(adapter.recovery[f"{layer}.down"].float().T)
            columns.append(adapter.recovery[f"{layer}.up"].float().T)
        found[layer] = torch.cat(rows), torch.cat(columns, dim=1)
    return found


def shared_lora(model: nn.Module) -> Adapter:
    """The recovery that belongs to a compressed base as a plain LoRA, whose values it has; without layers where there is none."""
    found = {name: recovery for name, layer in linear_layers(model).items() if (recovery := shared_of(layer))}
    return _plain({name: recovery.values() for name, recovery in found.items()})


def of_one_rank(adapter: Adapter) -> Adapter:
    """A folded adapter with one rank, alpha = r and no patterns, for runtimes that look at r and alpha alone: zeros are added."""
    found = factors(adapter)
    rank = max((len(a) for a, _ in found.values()), default=0)
    return _plain(
        {name: (F.pad(a, (0, 0, 0, rank - len(a))), F.pad(b, (0, rank - len(a)))) for name, (a, b) in found.items()}
    )


def _plain(found: Factors) -> Adapter:
    """The scale is in B already."""
    if not found:
        return Adapter(None, {})
    ranks = {layer: len(a) for layer, (a, _) in found.items()}
    lora = {
        f"{layer}.lora_{side}.weight": factor
        for layer, pair in found.items()
        for side, factor in zip("AB", pair, strict=True)
    }
    return Adapter(plain_config(ranks, dict.fromkeys(ranks, 1.0)), lora)
