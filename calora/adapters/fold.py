"""Fold a linear bypass into its LoRA, so that any LoRA runtime can serve the two."""

from __future__ import annotations

import torch
from torch import Tensor

from calora.adapters.lora import Adapter, lora_scale, plain_config
from calora.errors import CaloraError


def fold(adapter: Adapter) -> Adapter:
    """Fold a linear bypass into the LoRA, exactly: s B A + (D U)^T = [s B, U^T] [A; D^T].

    The result is a plain LoRA of rank r + rank on the layers that had both, which any LoRA runtime can serve.

    Raises:
        CaloraError: the bypass is not linear (`activation` is not `identity`), or the adapter has scales.
    """
    if adapter.scales:
        found = "scales of a grid, whose change of the weight has full rank: no LoRA holds it"
        raise CaloraError("fold", "a LoRA and a linear bypass", found, "load the adapter's folder with calora")
    activation = adapter.meta.get("activation")
    if adapter.recovery and activation != "identity":
        raise CaloraError("fold", "activation: identity", activation, "train it with a linear bypass")
    lora: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for layer in sorted({*adapter.lora_layers, *adapter.bypass_layers}):
        rows, columns = [], []
        if adapter.config is not None and f"{layer}.lora_A.weight" in adapter.lora:
            a, b = adapter.lora[f"{layer}.lora_A.weight"].float(), adapter.lora[f"{layer}.lora_B.weight"].float()
            rows.append(a)
            columns.append(b * lora_scale(adapter.config, layer))
        if f"{layer}.down" in adapter.recovery:
            rows.append(adapter.recovery[f"{layer}.down"].float().T)
            columns.append(adapter.recovery[f"{layer}.up"].float().T)
        lora[f"{layer}.lora_A.weight"] = torch.cat(rows)
        lora[f"{layer}.lora_B.weight"] = torch.cat(columns, dim=1)
        ranks[layer] = lora[f"{layer}.lora_A.weight"].shape[0]
    if not ranks:
        return Adapter(None, {})
    return Adapter(plain_config(ranks, dict.fromkeys(ranks, 1.0)), lora)  # the scale is in B already
