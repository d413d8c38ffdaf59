"""The plain LoRA that stands in for an adapter that is none: what a student starts from, while the teacher is all of it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from calora.adapters.lora import Adapter, plain_config
from calora.models.anatomy import linear_layers
from calora.models.moments import input_second_moments
from calora.models.tasks import Example
from calora.recovery.warmstart import best_linear_correction, weighted_size


def stand_in(model: PreTrainedModel, examples: Sequence[Example], rank: int) -> tuple[Adapter, dict[str, float]]:
    """The LoRA that is nearest to the adapter on `model`: of each layer's change W' - W the best map of rank k.

    min ||(W' - W - B A) X^T||_F (see `calora.recovery.warmstart`), X the inputs under the adapter: exact where the change
    has no more than that rank (AdaLoRA, small VeRA). Only the linear layers of the blocks get one.

    Args:
        model: the base, with an adapter of any kind on it, in use (`attach_whole`).
        examples: texts of the task; at least one where there is a layer to fit.
        rank: k >= 1; of a narrower layer its width.

    Returns:
        The LoRA, none if no linear layer of the blocks is changed, and for each layer what of the change's effect is
        left out, ||(W' - W - B A) X|| / ||(W' - W) X||.
    """
    layers = linear_layers(model)
    changed: dict[str, nn.Module] = {
        name: model.get_submodule(name) for name in layers if isinstance(model.get_submodule(name), BaseTunerLayer)
    }
    lora: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    for name, moment in input_second_moments(model, examples, changed) if changed else ():
        delta = _change(changed[name])
        if not bool(delta.any()):  # AdaLoRA may leave a layer no rank; zero in both factors could never learn
            continue
        p, q = best_linear_correction(delta, moment, min(rank, *delta.shape))
        lora[f"{name}.lora_A.weight"], lora[f"{name}.lora_B.weight"] = p.T.contiguous(), q.T.contiguous()
        errors[name] = round(weighted_size(delta - (p @ q).T, moment) / weighted_size(delta, moment), 6)
    if not lora:
        return Adapter(None, {}), {}
    ranks = {name: len(lora[f"{name}.lora_A.weight"]) for name in errors}
    return Adapter(plain_config(ranks, dict.fromkeys(ranks, 1.0), layers), dict(sorted(lora.items()))), errors


def _change(module: nn.Module) -> Tensor:
    """W' - W [out, in] in fp32, by PEFT's own merging, on a copy."""
    own: Any = copy.deepcopy(module).float()
    with torch.no_grad():
        before = own.get_base_layer().weight.detach().clone()
        own.merge()
        change: Tensor = own.get_base_layer().weight - before
    return change
