"""Recovery of the base: a low-rank map L beside each compressed weight, fitted together with the compression.

With C = X^T X and c the recipe's other steps, rounds of W_c = c(W - L; C) and L = the rank-k map that loses least of
W - W_c in the norm of C (HASSLE-free, arXiv 2502.00899), from L = 0, or from the map that keeps most of W, which then never
meets the grid (preserve, after SRR, arXiv 2602.02001, which keeps a part of the rank for it). One round from L = 0 fits L to a finished compression.
Layers that read one input are fitted as one, and share D (arXiv 2606.01412).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from calora.compression.options import FIX, Plan, one_of, parse, whole
from calora.compression.tune import Tuning
from calora.compression.walk import Block, Calibration, Change, Part, each_block
from calora.errors import CaloraError
from calora.layers.layout import dense_layer, dense_weight
from calora.models.anatomy import linear_layers
from calora.models.families import Encoder, family_of
from calora.models.tasks import Example
from calora.recovery.budget import Spectrum, share_out
from calora.recovery.shared import FORMATS, Factors, SharedRecovery, attach_shared
from calora.recovery.warmstart import best_linear_correction, weighted_size

FITS = ("after", "alternate", "preserve")
JOINT = ("prune", "quantize", "take")  # the steps that it is fitted together with
Notes = dict[str, dict[str, dict[str, Any]]]  # full name of a layer -> step -> what it says


@dataclass(frozen=True)
class Options:
    """Options of `recover`.

    Args:
        rank: k, of the layers that read one input together; at least 1, at most their widths.
        budget: instead of a rank, MB (10^6 bytes) of factors in all: they go where they mend most a byte, by the spectrum
            of the weighted error of each input's layers.
        fit: `after`: to the finished compression. `alternate`: in rounds with it. `preserve`: in rounds that start from
            the map of this rank that keeps most of W.
        rounds: of `alternate` and `preserve`, at least 1; the best one is kept, for each input.
        format: of the factors: `int8`, or `native`, the dtype of the base.
        tune: None, or how the factors are trained afterwards: {steps, lr, batch_size} (`tune.Tuning`).
    """

    fit: str
    format: str
    rank: int | None = None
    budget: float | None = None
    rounds: int | None = None
    tune: Mapping[str, Any] | None = None

    @property
    def tuning(self) -> Tuning | None:
        """`tune`, checked."""
        if self.tune is not None and not isinstance(self.tune, Mapping):
            raise CaloraError("recover.tune", "steps, lr and batch_size, or null", repr(self.tune), FIX)
        return None if self.tune is None else parse(Tuning, "recover.tune", self.tune)

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.budget is None):
            raise CaloraError("recover", "either a rank or a budget", f"{self.rank} and {self.budget}", FIX)
        if self.rank is not None:
            whole("recover.rank", self.rank, 1)
        elif not isinstance(self.budget, int | float) or not self.budget > 0:
            raise CaloraError("recover.budget", "MB above 0", repr(self.budget), FIX)
        one_of("recover.fit", self.fit, FITS)
        one_of("recover.format", self.format, FORMATS)
        if self.fit != "after":
            whole(f"recover.rounds (of {self.fit})", self.rounds, 1)
        elif self.rounds is not None:
            raise CaloraError("recover.rounds", "none: `after` is one round", self.rounds, FIX)
        _ = self.tuning


def check(model: PreTrainedModel, options: Options) -> None:
    """Raise `CaloraError` if the rank does not fit a layer, or the model has no head whose answers could tune it."""
    if options.tuning and isinstance(family_of(model), Encoder):
        fix = "leave `tune` out, or put a head on the base"
        raise CaloraError("recover.tune", "a model with a head", f"{type(model).__name__}, which has none", fix)
    for name, layer in linear_layers(model).items():
        widest = min(layer.in_features, layer.out_features)
        if options.rank and options.rank > widest:
            raise CaloraError(f"recover.rank, {name}", f"1 to {widest} (the layer's width)", options.rank, FIX)


@dataclass(frozen=True)
class Fitted:
    """One round of the layers that read one input.

    Args:
        layers: full name -> compressed layer.
        factors: L; None for 0.
        error: ||(W - W_c - L) X|| / ||W X||.
        notes: full name -> step -> what it says.
    """

    layers: dict[str, nn.Linear]
    factors: Factors | None
    error: float
    notes: Notes


@dataclass(frozen=True)
class Group:
    """The layers that read one input.

    Args:
        layers: full name -> layer, as it was found.
        moment: C = X^T X [in, in].
        weight: W [out of all, in], fp32.
        size: ||W X||.
    """

    layers: dict[str, nn.Linear]
    moment: Tensor
    weight: Tensor
    size: float

    @property
    def rows(self) -> list[int]:
        """The outputs of each layer."""
        return [layer.out_features for layer in self.layers.values()]

    def error(self, compressed: Mapping[str, nn.Linear]) -> Tensor:
        """E = W - W_c [out of all, in]."""
        return self.weight - below_one_another(compressed[name] for name in self.layers)

    def start(self, rank: int, options: Options, dtype: torch.dtype) -> Factors | None:
        """L before the first round; None for 0."""
        return self.map(self.weight, rank, options, dtype) if options.fit == "preserve" else None

    def without(self, factors: Factors | None) -> dict[str, nn.Linear]:
        """W - L, as dense layers."""
        left = {}
        for (name, layer), weight in zip(self.layers.items(), self.weight.split(self.rows), strict=True):
            left[name] = dense_layer(weight if factors is None else weight - factors.weight(name), layer.bias)
        return left

    def map(self, error: Tensor, rank: int, options: Options, dtype: torch.dtype) -> Factors | None:
        """The map of this rank that answers an error [out of all, in] best, as it will be stored; None of rank 0."""
        if rank == 0:
            return None
        p, q = best_linear_correction(error, self.moment, rank)  # [in, k], [k, out of all]
        return Factors.of(p, dict(zip(self.layers, q.split(self.rows, dim=1), strict=True)), options.format, dtype)

    def fitted(
        self, compressed: Mapping[str, nn.Linear], notes: Notes, rank: int, options: Options, dtype: torch.dtype
    ) -> Fitted:
        """L for layers that were compressed."""
        layers = {name: compressed[name] for name in self.layers}
        error = self.error(layers)
        factors = self.map(error, rank, options, dtype)
        left = error if factors is None else error - torch.cat([factors.weight(name) for name in layers])
        own = {name: notes.get(name, {}) for name in layers}
        return Fitted(layers, factors, weighted_size(left, self.moment) / self.size, own)

    def without_recovery(self, layers: Mapping[str, nn.Linear]) -> float:
        """||(W - W_c) X|| / ||W X||."""
        return weighted_size(self.error(layers), self.moment) / self.size

    def spectrum(self, compressed: Mapping[str, nn.Linear], options: Options, dtype: torch.dtype) -> Spectrum:
        """Of the error that a compression leaves."""
        narrowest, width = min(len(self.moment), *self.rows), len(self.moment) + len(self.weight)
        bytes = width * (1 if options.format == "int8" else dtype.itemsize)
        return Spectrum.of(self.error(compressed), self.moment, self.size**2, [bytes] * narrowest)


def below_one_another(layers: Iterable[nn.Linear]) -> Tensor:
    """The weights of layers that read one input, fp32 [out of all, in]."""
    return torch.cat([dense_weight(layer, torch.float32) for layer in layers])


def plan(
    model: PreTrainedModel, options: Options, examples: Sequence[Example], steps: Sequence[Part], dtype: torch.dtype
) -> Plan:
    """First layer of an input -> its rank; of a budget after one compression of the whole, on the inputs of the base."""
    if options.budget is None:
        return Plan()
    spectra: dict[str, Spectrum] = {}

    def look(block: Block) -> Change:
        groups = _groups(block)
        compressed, _ = _compressed(block, _all(group.without(None) for group in groups), steps)
        for group in groups:
            spectra[next(iter(group.layers))] = group.spectrum(compressed, options, dtype)
        return Change()

    each_block(model, [("recover", look)], Calibration(examples), dtype)
    return Plan(share_out(spectra, options.budget * 1e6))


def needs_whole(options: Options) -> str:
    """What of these options looks at the model as a whole: a tuning trains all maps together."""
    return "recover.tune" if options.tuning else ""


def change(block: Block, options: Options, plan: Plan, steps: Sequence[Part] = ()) -> Change:
    """Compress every linear layer of the block by `steps`, with its recovery beside it."""
    groups = _groups(block)
    ranks = [options.rank or plan.values[next(iter(group.layers))] for group in groups]
    maps = [group.start(rank, options, block.dtype) for group, rank in zip(groups, ranks, strict=True)]
    turns: list[list[Fitted]] = [[] for _ in groups]
    for _turn in range(options.rounds or 1):
        left = _all(group.without(factors) for group, factors in zip(groups, maps, strict=True))
        compressed, notes = _compressed(block, left, steps)
        for i, group in enumerate(groups):
            turns[i].append(group.fitted(compressed, notes, ranks[i], options, block.dtype))
            maps[i] = turns[i][-1].factors
    made = Change()
    for group, fits, rank in zip(groups, turns, ranks, strict=True):
        best = min(fits, key=lambda fit: fit.error)
        without = group.without_recovery(best.layers)
        said = {"rank": rank, "rounds": [round(fit.error, 6) for fit in fits], "without": round(without, 6)}
        for name, layer in best.layers.items():
            if best.factors is not None:
                attach_shared(layer, SharedRecovery(best.factors, name))
            made.modules[name], made.earlier[name], made.notes[name] = layer, best.notes[name], said
    return made


def _groups(block: Block) -> list[Group]:
    """The layers of a block, by the input that they read."""
    groups = []
    for layers in block.groups():
        moment = block.moments()[next(iter(layers))]
        weight = below_one_another(layers.values())
        groups.append(Group(layers, moment, weight, weighted_size(weight, moment)))
    return groups


def _all(parts: Iterable[Mapping[str, nn.Linear]]) -> dict[str, nn.Linear]:
    return {name: layer for part in parts for name, layer in part.items()}


def _compressed(
    block: Block, left: Mapping[str, nn.Linear], steps: Sequence[Part]
) -> tuple[dict[str, nn.Linear], Notes]:
    """What the steps make of these layers, on the inputs that the block was found with; the block is left as it was."""
    found, notes = block.layers, Notes()
    with block.held():
        block.put(left)
        for step, part in steps:
            done = part(block)
            block.put(done.modules)
            for name in {*done.modules, *done.notes}:
                notes.setdefault(name, {})[step] = done.notes.get(name, {})
        made = block.layers
        block.put(found)
    return made, notes
