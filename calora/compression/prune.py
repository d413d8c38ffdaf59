"""Pruning to the 2:4 pattern: of every four consecutive inputs of a row the two with the highest score stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from calora.calibrate import input_square_sums, linear_layers
from calora.errors import CaloraError
from calora.packed import PackedLinear
from calora.tasks import Example

SCORES = ("wanda", "magnitude")


def keep_2_4(score: Tensor) -> Tensor:
    """Mask [out, in] of the two highest scores in every group of four consecutive inputs."""
    groups = score.view(score.shape[0], -1, 4)
    best = groups.topk(2, dim=-1).indices
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, best, True).view_as(score)


def prune(model: PreTrainedModel, options: dict[str, Any], calibration: Sequence[Example]) -> dict[str, nn.Module]:
    """Prune every linear layer of the blocks; returns the new layers by name.

    Options: `score` = `wanda`, |W_ij| * ||X_j||_2 (arXiv 2306.11695, eq. 1), or `magnitude`, |W_ij|; `pattern` = `2:4`.

    Raises:
        CaloraError: an option is unknown, a width is not divisible by 4, or a layer is already packed.
    """
    score, pattern = options.get("score"), options.get("pattern")
    if set(options) != {"score", "pattern"} or score not in SCORES or pattern != "2:4":
        raise CaloraError("prune", f"score: one of {', '.join(SCORES)}; pattern: '2:4'", options, "mend the recipe")
    layers = linear_layers(model)
    for name, layer in layers.items():
        if type(layer) is not nn.Linear:
            raise CaloraError(f"prune {name}", "a dense layer", type(layer).__name__, "prune before quantising")
        if layer.in_features % 4:
            raise CaloraError(f"prune {name}", "a width divisible by 4", layer.in_features, "use another recipe")
    sums = input_square_sums(model, calibration) if score == "wanda" else {}
    pruned: dict[str, nn.Module] = {}
    for name, layer in layers.items():
        importance = layer.weight.detach().float().abs()
        if score == "wanda":
            importance *= sums[name].sqrt()
        pruned[name] = PackedLinear.pack(layer, keep_2_4(importance), "native")
    return pruned
