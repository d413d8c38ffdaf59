"""Inherit: carry a LoRA that was trained on the uncompressed model onto the compressed one, by name and strictly."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from calora.adapters.lora import (
    Adapter,
    Rank,
    attach_adapter,
    check_targets,
    detach_adapter,
    lora_rank,
    lora_scale,
    plain_config,
    ranks_of,
    set_active,
)
from calora.adapters.origin import Origin
from calora.common.leastsquares import compensated
from calora.common.progress import progress
from calora.errors import CaloraError
from calora.inheritance.fresh import fresh_lora, unchanged_scales
from calora.layers.layout import dense_weight
from calora.models.anatomy import linear_layers, module_names
from calora.models.moments import held_together, input_second_moments
from calora.models.tasks import Example
from calora.recovery.bypass import ACTIVATIONS, RecoveryBypass
from calora.recovery.warmstart import best_linear_correction, correction_rank, linear_as_bypass

LORAS = ("inherited", "fresh", "none")
STARTS = ("weighted_error", "zero")
WHOLE = Origin()
TEACHER = "calora_teacher"  # the name of the LoRA on the reference, for as long as it is looked at


@dataclass(frozen=True)
class Bypass:
    """The recovery module to put beside each target layer.

    Args:
        targets: last parts of the names of the layers that get one.
        rank: of every layer, or by layer (see `ranks.share_ranks`): layers that it does not name get no bypass.
            1 <= rank <= the layer's width; even for a warm start that is not linear.
        activation: `gelu`, `relu`, `silu` or `identity`.
        start: `weighted_error` (the exact linear warm start), or `zero` (the paper's: U = 0, an exact no-op).
    """

    targets: Sequence[str]
    rank: Rank
    activation: str
    start: str

    def __post_init__(self) -> None:
        for name, value, known in (("activation", self.activation, tuple(ACTIVATIONS)), ("start", self.start, STARTS)):
            if value not in known:
                raise CaloraError(f"bypass.{name}", f"one of {', '.join(known)}", value, "choose one of them")
        if self.start == "weighted_error":
            for rank in set(ranks_of(self.rank, self.targets).values()):
                correction_rank(rank, self.activation)


@dataclass(frozen=True)
class Inheritance:
    """What became of the teacher's LoRA, and what the warm start gained.

    Args:
        mapped: layer -> [in, out] of each layer with a LoRA.
        sliced: layer -> the original's [in, out], of those that lost some.
        dropped: tensors of layers that were cut.
        errors: each layer that the bypass's targets name -> [before, after], the weighted error ||E X|| / ||W X|| without
            and with its warm start; empty for a zero start.
    """

    mapped: Mapping[str, list[int]] = field(default_factory=dict)
    sliced: Mapping[str, list[int]] = field(default_factory=dict)
    dropped: Sequence[str] = ()
    errors: Mapping[str, list[float]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As stored beside the adapter."""
        return {**asdict(self), "dropped": list(self.dropped)}


def carry_lora(model: PreTrainedModel, teacher: Adapter, origin: Origin) -> tuple[Adapter, Inheritance]:
    """The teacher's LoRA in the shape of the compressed model: what was cut there is cut here.

    Raises:
        CaloraError: a layer is not there, an A or B is missing, or a width differs.
    """
    layers = linear_layers(model)
    lora, dropped = origin.carry(teacher.lora, layers)
    mapped: dict[str, list[int]] = {}
    sliced: dict[str, list[int]] = {}
    for layer in Adapter(None, lora).lora_layers:
        have = [lora[f"{layer}.lora_A.weight"].shape[1], lora[f"{layer}.lora_B.weight"].shape[0]]
        want = [layers[layer].in_features, layers[layer].out_features]
        if have != want:
            raise CaloraError(f"inherited layer {layer}", f"in, out = {want}", have, "use an adapter of this base")
        mapped[layer] = want
        had = _widths(teacher, origin.source(layer))
        if had != want:
            sliced[layer] = had
    config = None
    if mapped and teacher.config is not None:  # by the new names: patterns of the old ones may name layers by number
        sources = {layer: origin.source(layer) for layer in mapped}
        ranks = {layer: lora_rank(teacher.config, source) for layer, source in sources.items()}
        scales = {layer: lora_scale(teacher.config, source) for layer, source in sources.items()}
        config = plain_config(ranks, scales, module_names(model))
    return Adapter(config, lora, {}, dict(teacher.meta)), Inheritance(mapped, sliced, dropped)


def _widths(adapter: Adapter, layer: str) -> list[int]:
    """[in, out] of a LoRA."""
    return [adapter.lora[f"{layer}.lora_A.weight"].shape[1], adapter.lora[f"{layer}.lora_B.weight"].shape[0]]


def inherit(
    model: PreTrainedModel,
    teacher: Adapter,
    *,
    lora: str = "inherited",
    bypass: Bypass | None = None,
    scales: bool = False,
    reference: PreTrainedModel | None = None,
    calibration: Sequence[Example] = (),
    moments: MutableMapping[str, Tensor] | None = None,
    origin: Origin = WHOLE,
    seed: int = 0,
) -> tuple[Adapter, Inheritance]:
    """The adapter that CA-LoRA starts from: the teacher's LoRA, an initialised bypass, scales that change nothing yet.

    Args:
        model: the compressed model (packed or its dense view).
        teacher: the LoRA that was trained on the uncompressed model.
        lora: `inherited`; `fresh`, one of the same shape as PEFT starts it; or `none`.
        bypass: the recovery module; None for none.
        scales: whether the task gets scales of its own for the grids of the compressed weights (PEQA, arXiv 2305.14152).
        reference: the uncompressed model. It is needed for a warm start, and for an inherited LoRA on layers that lost
            inputs. With an inherited LoRA its inputs are those under the teacher's; it is left as it was.
        calibration: examples of the task, whose inputs weigh the compression error.
        moments: what another look at the same examples found (`moments_of`), the teacher on the reference as here.
        origin: where the compressed model's layers come from, if some were cut or reordered.
        seed: of a fresh LoRA, and of the D of a bypass that starts from zero.

    Raises:
        CaloraError: an argument is outside its range, `reference` or `calibration` is needed and not there, or no layer
            is on a grid whose scales could be the task's.
    """
    if lora not in LORAS:
        raise CaloraError("lora", f"one of {', '.join(LORAS)}", lora, "choose one of them")
    beside = check_targets(model, bypass.targets, bypass.rank) if bypass else {}
    ranks = ranks_of(bypass.rank, beside) if bypass else {}
    adapter, report = carry_lora(model, teacher, origin)
    if lora == "none":
        adapter, report = replace(adapter, config=None, lora={}), Inheritance()
    if lora == "fresh":
        adapter.lora = fresh_lora(adapter.lora, seed)
    if bypass:
        adapter.recovery = random_bypasses(beside, ranks, bypass.activation, seed)
        adapter.meta |= {"activation": bypass.activation}
    if scales:
        adapter.scales = unchanged_scales(model)
    warm = beside if bypass and bypass.start == "weighted_error" else {}
    refit = {layer for layer in report.sliced if _lost_inputs(report, layer)} if lora == "inherited" else set()
    if not (warm or refit):
        return adapter, report
    whole = needed(reference, calibration, "a warm start" if warm else f"the LoRA on {min(refit)}, which lost inputs")
    errors: dict[str, list[float]] = {}
    layers = linear_layers(whole)
    with taught(whole, teacher if lora == "inherited" else None):
        for key, moment in moments_of(whole, sorted({*refit, *warm}), origin, calibration, "warm start", moments):
            if key in refit:
                a = teacher.lora[f"{origin.source(key)}.lora_A.weight"]
                adapter.lora[f"{key}.lora_A.weight"] = origin.fit_columns(key, a, moment)
            if key in warm and bypass:
                lost = weighted_error(layers, key, warm[key], origin, moment)
                start, errors[key] = _warm_start(ranks.get(key, 0), bypass.activation, *lost)
                adapter.recovery |= {f"{key}.{part}": tensor for part, tensor in start.items()}
    return adapter, replace(report, errors=errors)


def _lost_inputs(report: Inheritance, layer: str) -> bool:
    return report.sliced[layer][0] != report.mapped[layer][0]


def needed(reference: PreTrainedModel | None, calibration: Sequence[Example], why: str) -> PreTrainedModel:
    """The uncompressed model.

    Raises:
        CaloraError: it is not there, or no text is.
    """
    if reference is None:
        raise CaloraError("reference", f"the uncompressed model, for {why}", None, "give it")
    if not calibration:
        raise CaloraError("calibration", f"examples of the task, for {why}", "none", "give some")
    return reference


@contextmanager
def taught(reference: PreTrainedModel, teacher: Adapter | None) -> Iterator[None]:
    """The teacher's LoRA on the reference, for as long as the block runs."""
    if teacher is None:
        yield
        return
    attach_adapter(reference, teacher, TEACHER)
    try:
        set_active(reference, TEACHER)
        yield
    finally:
        detach_adapter(reference, TEACHER)


def random_bypasses(layers: Mapping[str, nn.Linear], rank: Rank, activation: str, seed: int = 0) -> dict[str, Tensor]:
    """The paper's start: D random, U = 0."""
    generator = torch.Generator().manual_seed(seed)
    recovery: dict[str, Tensor] = {}
    for key, own in ranks_of(rank, layers).items():
        layer = layers[key]
        bypass = RecoveryBypass(layer.in_features, layer.out_features, own, activation)
        with torch.no_grad():
            bypass.down.normal_(0, layer.in_features**-0.5, generator=generator)
        recovery[f"{key}.down"], recovery[f"{key}.up"] = bypass.down.detach(), bypass.up.detach()
    return recovery


def moments_of(
    reference: PreTrainedModel,
    layers: Sequence[str],
    origin: Origin,
    calibration: Sequence[Example],
    title: str,
    seen: MutableMapping[str, Tensor] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield (compressed layer, X^T X [in, in]); X are the inputs that the *uncompressed* model sees.

    Those of the compressed one have drifted, and a correction that is fitted to them is far worse (docs/method.md has
    the figures).

    Args:
        seen: layer of the reference -> X^T X, of earlier looks at the same texts; takes those of this one, where they may
            be held together.
    """
    whole, names = linear_layers(reference), {origin.source(key): key for key in layers}
    missing = sorted(set(names) - set(whole))
    if missing:
        raise CaloraError("reference", "the model that was compressed", f"one without {missing[0]}", "give that one")
    asked = {source: whole[source] for source in names}
    if seen is None or not held_together(asked):
        found = input_second_moments(reference, calibration, asked)
    else:
        new = {source: layer for source, layer in asked.items() if source not in seen}
        seen.update(input_second_moments(reference, calibration, new))
        found = ((source, seen[source]) for source in asked)
    for source, moment in progress(found, title, "layers", len(layers)):
        yield names[source], moment.cpu()  # the algebra is done there, wherever the model ran


def weighted_error(
    reference: Mapping[str, nn.Linear], key: str, layer: nn.Linear, origin: Origin, moment: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(X^T X [in, in], W, E = W - W_c [out, in]) of a layer, in the shape of the compressed one.

    Where inputs were cut, W is the best that the remaining ones can do.

    Args:
        reference: the uncompressed model's layers.
    """
    whole = reference[origin.source(key)]
    weight, columns = origin.slice_rows(key, whole.weight.detach().float().cpu()), origin.columns(key)
    if columns is not None:
        weight, moment = compensated(weight, moment, columns), moment[columns][:, columns]
    elif (scale := origin.input_scale(key)) is not None:
        weight, moment = weight * scale, moment / scale / scale.unsqueeze(1)
    return moment, weight, weight - dense_weight(layer, torch.float32)


def _warm_start(
    rank: int, activation: str, moment: Tensor, weight: Tensor, error: Tensor
) -> tuple[dict[str, Tensor], list[float]]:
    """The bypass's down and up (none of rank 0, or where there is nothing to correct), and the error [before, after]."""
    before = relative(error, weight, moment)
    if rank == 0 or not bool(error.any()):  # a zero start in both factors could never learn
        return {}, [before, before]
    p, q = best_linear_correction(error, moment, correction_rank(rank, activation))
    down, up = linear_as_bypass(p, q, activation, rank)
    return {"down": down, "up": up}, [before, relative(error - (p @ q).T, weight, moment)]


def relative(error: Tensor, weight: Tensor, moment: Tensor) -> float:
    """||E X|| / ||W X||, from X^T X."""
    lost, whole = (float(((e @ moment) * e).sum()) for e in (error, weight))
    return round(math.sqrt(max(lost, 0.0) / max(whole, 1e-30)), 6)
