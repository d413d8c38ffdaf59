"""What starts anew: a LoRA as PEFT starts it, one with the budget of another adapter, scales that change nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import PreTrainedModel

from calora.adapters.lora import Adapter, lora_rank, lora_scale, plain_config, targeted
from calora.adapters.scales import PART, on_grid
from calora.errors import CaloraError
from calora.models.anatomy import linear_layers


def fresh_lora(like: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """A LoRA of the same shape as PEFT starts it: A uniform as Kaiming (a = sqrt(5)), B = 0."""
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, Tensor] = {}
    for key, tensor in sorted(like.items()):
        made[key] = torch.zeros_like(tensor)
        if ".lora_A." in key:
            made[key].copy_(nn.init.kaiming_uniform_(torch.empty(tensor.shape), a=5**0.5, generator=generator))
    return made


def fresh_adapter(
    model: PreTrainedModel, config: LoraConfig, meta: Mapping[str, Any] | None = None, seed: int = 0
) -> Adapter:
    """A new LoRA on the layers that `config` names, as PEFT starts it; the same for the same seed.

    Raises:
        CaloraError: the configuration names no linear layer of the model's blocks.
    """
    layers, like = linear_layers(model), {}
    for layer in sorted(targeted(model, config) & layers.keys()):
        rank = lora_rank(config, layer)
        like[f"{layer}.lora_A.weight"] = torch.empty(rank, layers[layer].in_features)
        like[f"{layer}.lora_B.weight"] = torch.empty(layers[layer].out_features, rank)
    if not like:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
        raise CaloraError("target_modules", f"names among {known}", config.target_modules, "name layers of this model")
    return Adapter(config, fresh_lora(like, seed), {}, dict(meta or {}))


def unchanged_scales(model: PreTrainedModel) -> dict[str, Tensor]:
    """Ratios of 0 for every layer of the blocks that is on a grid: `<layer>.scales` [out, groups], an exact no-op.

    Raises:
        CaloraError: none is.
    """
    grids = {name: (layer.out_features, on_grid(layer)) for name, layer in linear_layers(model).items()}
    made = {f"{name}{PART}": torch.zeros(rows, grid.scale_groups) for name, (rows, grid) in grids.items() if grid}
    if not made:
        expected = "layers on a grid (int8 to int2)"
        raise CaloraError(
            "scales", expected, "none", "quantize the base to one of these formats (nf4 has no such grid)"
        )
    return made


def equal_budget(adapter: Adapter, modules: Iterable[str]) -> LoraConfig:
    """A LoRA with exactly as many parameters as `adapter`: in each layer its LoRA's rank there + its bypass's.

    Both have rank (in + out) parameters a layer. The scale alpha / r is that of the adapter's LoRA, or 1 without one.

    Args:
        modules: the names of all modules of the model.

    Raises:
        CaloraError: the adapter is empty, or has scales.
    """
    if adapter.scales:
        found = "scales, of which each output has as many as its grid has groups"
        raise CaloraError("equal_budget", "an adapter with a LoRA or a bypass alone", found, "name another adapter")
    config = adapter.config
    ranks = {layer: adapter.lora[f"{layer}.lora_A.weight"].shape[0] for layer in adapter.lora_layers}
    scales = {layer: lora_scale(config, layer) for layer in ranks} if config is not None else {}
    common = 1.0 if config is None else config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    for layer in adapter.bypass_layers:
        ranks[layer] = ranks.get(layer, 0) + adapter.recovery[f"{layer}.down"].shape[1]
        scales.setdefault(layer, common)
    if not ranks:
        raise CaloraError("equal_budget", "an adapter with a LoRA or a bypass", "an empty one", "name another adapter")
    return plain_config(ranks, scales, modules)
