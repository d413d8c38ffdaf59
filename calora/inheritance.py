"""Inherit: carry a LoRA that was trained on the uncompressed model onto the compressed one, by name and strictly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from calora.adapters import Adapter, attach_adapter
from calora.calibrate import input_second_moments, linear_layers
from calora.compression import dense_weight
from calora.errors import CaloraError
from calora.progress import progress
from calora.recovery import RecoveryBypass
from calora.tasks import Example
from calora.warmstart import best_linear_correction, correction_rank, linear_as_bypass

STARTS = ("weighted_error", "zero")


def map_lora(model: PreTrainedModel, lora: dict[str, Tensor]) -> dict[str, list[int]]:
    """Check that every LoRA tensor fits a layer of `model`; returns layer -> [in, out] of all that were mapped.

    Raises:
        CaloraError: a layer is not there, an A or B is missing, or a width differs.
    """
    layers = linear_layers(model)
    mapped: dict[str, list[int]] = {}
    for key in lora:
        layer, _, part = key.partition(".lora_")
        if layer not in layers or part not in ("A.weight", "B.weight"):
            raise CaloraError(
                f"inherited tensor {key}",
                "a linear layer of the compressed base",
                "none of that name",
                "use an adapter of this base",
            )
        pair = [lora.get(f"{layer}.lora_A.weight"), lora.get(f"{layer}.lora_B.weight")]
        if pair[0] is None or pair[1] is None:
            raise CaloraError(
                f"inherited layer {layer}", "both lora_A and lora_B", "one of them", "retrain the adapter"
            )
        have, want = [pair[0].shape[1], pair[1].shape[0]], [layers[layer].in_features, layers[layer].out_features]
        if have != want:
            raise CaloraError(f"inherited layer {layer}", f"in, out = {want}", have, "use an adapter of this base")
        mapped[layer] = want
    return mapped


def inherit(
    model: PreTrainedModel,
    teacher: Adapter,
    reference: Callable[[str], Tensor],
    calibration: Sequence[Example],
    *,
    targets: Sequence[str],
    rank: int,
    activation: str,
    start: str,
    name: str = "default",
) -> tuple[Adapter, dict[str, Any]]:
    """The adapter that CA-LoRA starts from: the teacher's LoRA and an initialised bypass, both put on `model`.

    Args:
        model: the compressed model (packed or its dense view).
        teacher: the LoRA that was trained on the uncompressed model.
        reference: layer name -> the uncompressed weight [out, in].
        calibration: examples of the task, whose inputs weigh the compression error.
        targets: last parts of the names of the layers that get a bypass.
        rank, activation: of the bypass; 1 <= rank <= the layer's width.
        start: `weighted_error` (the exact linear warm start), or `zero` (the paper's: U = 0, an exact no-op).

    Returns:
        The adapter, and a report: `mapped` (layer -> [in, out]) and `bypass` (layer -> share of the weighted error
        ||E X||^2 that the warm start removes, 0 for `zero`).
    """
    if start not in STARTS:
        raise CaloraError("inherit.start", f"one of {', '.join(STARTS)}", start, "mend params.yaml")
    layers = {key: m for key, m in linear_layers(model).items() if key.rsplit(".", 1)[-1] in targets}
    absent = sorted(set(targets) - {key.rsplit(".", 1)[-1] for key in layers})
    if absent or not layers:
        names = sorted({key.rsplit(".", 1)[-1] for key in linear_layers(model)})
        raise CaloraError("inherit.targets", f"names among {', '.join(names)}", absent or "none", "mend params.yaml")
    mapped = map_lora(model, teacher.lora)
    removed: dict[str, float] = {}
    recovery: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for key, layer in layers.items():
        bypass = RecoveryBypass(layer.in_features, layer.out_features, rank, activation)
        with torch.no_grad():
            bypass.down.normal_(0, layer.in_features**-0.5, generator=generator)
        recovery[f"{key}.down"], recovery[f"{key}.up"] = bypass.down.detach(), bypass.up.detach()
        removed[key] = 0.0
    meta = {**teacher.meta, "activation": activation}
    if start == "weighted_error":
        # Inputs are taken with the inherited LoRA in place: what the bypass will see.
        attach_adapter(model, Adapter(teacher.config, teacher.lora), name)
        wanted = {
            key: layer for key, layer in linear_layers(model).items() if key in layers
        }  # now under PEFT's wrapping
        moments = input_second_moments(model, calibration, wanted)
        for key, moment in progress(moments, "warm start", "layers", len(layers)):
            error = reference(key).float() - dense_weight(layers[key], torch.float32)
            p, q = best_linear_correction(error, moment, correction_rank(rank, activation))
            recovery[f"{key}.down"], recovery[f"{key}.up"] = linear_as_bypass(p, q, activation, rank)
            rest = error - (p @ q).T
            before, after = (float(((e @ moment) * e).sum()) for e in (error, rest))
            removed[key] = round(1 - after / before, 4) if before > 0 else 0.0
    return Adapter(teacher.config, teacher.lora, recovery, meta), {"mapped": mapped, "bypass": removed}
