"""Inherit: carry a LoRA that was trained on the uncompressed model onto the compressed one, by name and strictly."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import PreTrainedModel

from calora.adapters.lora import Adapter, attach_adapter, check_targets, lora_config, lora_scale, set_active
from calora.adapters.origin import Origin
from calora.common.leastsquares import compensated
from calora.common.progress import progress
from calora.errors import CaloraError
from calora.layers.layout import dense_weight
from calora.models.anatomy import linear_layers
from calora.models.moments import input_second_moments
from calora.models.tasks import Example
from calora.recovery.bypass import RecoveryBypass
from calora.recovery.warmstart import best_linear_correction, correction_rank, linear_as_bypass

STARTS = ("weighted_error", "zero")
WHOLE = Origin()


def carry_lora(model: PreTrainedModel, teacher: Adapter, origin: Origin) -> tuple[Adapter, dict[str, Any]]:
    """The teacher's LoRA in the shape of the compressed model.

    Returns:
        The adapter, and `mapped` (layer -> [in, out] of all that were mapped), `sliced` (layer -> the original's
        [in, out] of those that lost some), `dropped` (tensors of layers that were cut).

    Raises:
        CaloraError: a layer is not there, an A or B is missing, or a width differs.
    """
    layers = linear_layers(model)
    lora, dropped = origin.carry(teacher.lora, layers)
    mapped: dict[str, list[int]] = {}
    sliced: dict[str, list[int]] = {}
    for layer in sorted({key.partition(".lora_")[0] for key in lora}):
        have = [lora[f"{layer}.lora_A.weight"].shape[1], lora[f"{layer}.lora_B.weight"].shape[0]]
        want = [layers[layer].in_features, layers[layer].out_features]
        if have != want:
            raise CaloraError(f"inherited layer {layer}", f"in, out = {want}", have, "use an adapter of this base")
        mapped[layer] = want
        source = origin.source(layer)
        had = [teacher.lora[f"{source}.lora_A.weight"].shape[1], teacher.lora[f"{source}.lora_B.weight"].shape[0]]
        if had != want:
            sliced[layer] = had
    config = teacher.config if not origin.layers else _renumbered(teacher.config, mapped, lora, origin)
    return Adapter(config, lora, {}, dict(teacher.meta)), {"mapped": mapped, "sliced": sliced, "dropped": dropped}


def _renumbered(
    config: LoraConfig, mapped: Mapping[str, Any], lora: Mapping[str, Tensor], origin: Origin
) -> LoraConfig:
    """The configuration with every layer by its new name: patterns of the old one may name layers by number."""
    ranks = {layer: lora[f"{layer}.lora_A.weight"].shape[0] for layer in mapped}
    scales = {layer: lora_scale(config, origin.source(layer)) for layer in mapped}
    made = lora_config(config.r, config.lora_alpha, sorted(mapped))
    made.rank_pattern = dict(ranks)
    made.alpha_pattern = {layer: scales[layer] * rank for layer, rank in ranks.items()}
    return made


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
    origin: Origin = WHOLE,
    lora: bool = True,
    bypass: bool = True,
    seed: int = 0,
) -> tuple[Adapter, dict[str, Any]]:
    """The adapter that CA-LoRA starts from: the teacher's LoRA and an initialised bypass.

    Args:
        model: the compressed model (packed or its dense view).
        reference: the uncompressed model; the warm start puts the teacher's LoRA on it.
        teacher: the LoRA that was trained on the uncompressed model.
        calibration: examples of the task, whose inputs weigh the compression error.
        targets: last parts of the names of the layers that get a bypass.
        rank, activation: of the bypass; 1 <= rank <= the layer's width.
        origin: where the compressed model's layers come from, if some were cut or reordered.
        start: `weighted_error` (the exact linear warm start), or `zero` (the paper's: U = 0, an exact no-op).
        lora, bypass: False for the ablation: a fresh LoRA of the teacher's shape (the reference then goes without the
            teacher's), and no bypass.
        seed: of a fresh LoRA.

    Returns:
        The adapter, and a report: what `carry_lora` says, and `errors` (layer with a bypass -> [before, after]: the
        weighted error ||E X|| / ||W X|| without and with the warm start, the same for `zero`).
    """
    if start not in STARTS:
        raise CaloraError("inherit.start", f"one of {', '.join(STARTS)}", start, "mend params.yaml")
    layers = check_targets(model, targets, rank, "inherit")
    adapter, report = carry_lora(model, teacher, origin)
    tensors = adapter.lora if lora else fresh_lora(adapter.lora, seed)
    meta = {**teacher.meta, "activation": activation, "recovery": bypass}
    errors: dict[str, list[float]] = {}
    if not bypass:
        return Adapter(adapter.config, tensors, {}, meta), {**report, "errors": errors}
    recovery = random_bypasses(layers, rank, activation)
    if lora:
        attach_adapter(reference, teacher, "teacher")
        set_active(reference, "teacher")
    for key, moment, weight, error in weighted_errors(reference, layers, origin, calibration):
        before = after = relative(error, weight, moment)
        if start == "weighted_error" and bool(error.any()):  # else a zero start in both factors could never learn
            p, q = best_linear_correction(error, moment, correction_rank(rank, activation))
            recovery[f"{key}.down"], recovery[f"{key}.up"] = linear_as_bypass(p, q, activation, rank)
            after = relative(error - (p @ q).T, weight, moment)
        errors[key] = [before, after]
    return Adapter(adapter.config, tensors, recovery, meta), {**report, "errors": errors}


def fresh_lora(like: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """A LoRA of the same shape as PEFT starts it: A uniform as Kaiming (a = sqrt(5)), B = 0."""
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, Tensor] = {}
    for key, tensor in sorted(like.items()):
        made[key] = torch.zeros_like(tensor)
        if ".lora_A." in key:
            made[key].copy_(nn.init.kaiming_uniform_(torch.empty(tensor.shape), a=5**0.5, generator=generator))
    return made


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
    reference: PreTrainedModel, layers: Mapping[str, nn.Linear], origin: Origin, calibration: Sequence[Example]
) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """Yield (layer, X^T X [in, in], W, E = W - W_c [out, in]), in the shape of the compressed layer.

    X are the inputs that the *uncompressed* model sees: those of the compressed one have drifted, and a correction
    that is fitted to them is far worse (docs/method.md has the figures). Where inputs were cut, W is the best that the
    remaining ones can do.
    """
    whole, names = linear_layers(reference), {origin.source(key): key for key in layers}
    moments = input_second_moments(reference, calibration, {source: whole[source] for source in names})
    for source, moment in progress(moments, "warm start", "layers", len(layers)):
        key = names[source]
        weight, columns = origin.slice_rows(key, whole[source].weight.detach().float()), origin.columns(key)
        if columns is not None:
            weight, moment = compensated(weight, moment, columns), moment[columns][:, columns]
        yield key, moment, weight, weight - dense_weight(layers[key], torch.float32)


def relative(error: Tensor, weight: Tensor, moment: Tensor) -> float:
    """||E X|| / ||W X||, from X^T X."""
    lost, whole = (float(((e @ moment) * e).sum()) for e in (error, weight))
    return round(math.sqrt(max(lost, 0.0) / max(whole, 1e-30)), 6)
