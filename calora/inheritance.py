"""Inherit: carry a LoRA that was trained on the uncompressed model onto the compressed one, by name and strictly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from calora.adapters import Adapter, attach_adapter, check_targets, set_active
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
    reference: PreTrainedModel,
    teacher: Adapter,
    calibration: Sequence[Example],
    *,
    targets: Sequence[str],
    rank: int,
    activation: str,
    start: str,
) -> tuple[Adapter, dict[str, Any]]:
    """The adapter that CA-LoRA starts from: the teacher's LoRA and an initialised bypass.

    Args:
        model: the compressed model (packed or its dense view).
        reference: the uncompressed model; the warm start puts the teacher's LoRA on it.
        teacher: the LoRA that was trained on the uncompressed model.
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
    layers = check_targets(model, targets, rank, "inherit")
    mapped = map_lora(model, teacher.lora)
    recovery = random_bypasses(layers, rank, activation)
    removed = dict.fromkeys(layers, 0.0)
    if start == "weighted_error":
        attach_adapter(reference, teacher, "teacher")
        set_active(reference, "teacher")
        for key, moment, error in weighted_errors(reference, layers, calibration):
            p, q = best_linear_correction(error, moment, correction_rank(rank, activation))
            recovery[f"{key}.down"], recovery[f"{key}.up"] = linear_as_bypass(p, q, activation, rank)
            removed[key] = removed_share(error, (p @ q).T, moment)
    meta = {**teacher.meta, "activation": activation}
    return Adapter(teacher.config, teacher.lora, recovery, meta), {"mapped": mapped, "bypass": removed}


def random_bypasses(layers: Mapping[str, nn.Linear], rank: int, activation: str) -> dict[str, Tensor]:
    """The paper's start: D random, U = 0."""
    generator = torch.Generator().manual_seed(0)
    recovery: dict[str, Tensor] = {}
    for key, layer in layers.items():
        bypass = RecoveryBypass(layer.in_features, layer.out_features, rank, activation)
        with torch.no_grad():
            bypass.down.normal_(0, layer.in_features**-0.5, generator=generator)
        recovery[f"{key}.down"], recovery[f"{key}.up"] = bypass.down.detach(), bypass.up.detach()
    return recovery


def weighted_errors(
    reference: PreTrainedModel, layers: Mapping[str, nn.Linear], calibration: Sequence[Example]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield (layer, X^T X [in, in], E = W - W_c [out, in]).

    X are the inputs that the *uncompressed* model sees: those of the compressed one have drifted, and a correction
    that is fitted to them is far worse (docs/method.md has the figures).
    """
    whole = {key: layer for key, layer in linear_layers(reference).items() if key in layers}
    moments = input_second_moments(reference, calibration, whole)
    for key, moment in progress(moments, "warm start", "layers", len(layers)):
        yield key, moment, whole[key].weight.detach().float() - dense_weight(layers[key], torch.float32)


def removed_share(error: Tensor, correction: Tensor, moment: Tensor) -> float:
    """1 - ||(E - T) X||^2 / ||E X||^2, 0 where there is no error."""
    before, after = (float(((e @ moment) * e).sum()) for e in (error, error - correction))
    return round(1 - after / before, 4) if before > 0 else 0.0
