"""Pruning: unstructured, or N of every M consecutive inputs; by magnitude, Wanda, or SparseGPT with weight update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from calora.compression.options import FIX, Plan, one_of, share
from calora.compression.sparsegpt import Choose, sparsegpt
from calora.compression.surgeon import COLUMNS
from calora.compression.walk import Block, Change
from calora.errors import CaloraError
from calora.layers.packed import PackedLinear, Packing
from calora.models.anatomy import linear_layers, stacks
from calora.models.blocks import blocks_of
from calora.models.moments import input_square_sums
from calora.models.tasks import Example

PATTERNS = {"2:4": (2, 4), "4:8": (4, 8)}
OUTLIER, SPREAD = 5.0, 0.08  # OWL's M and lambda (arXiv 2310.05175, section 4)


@dataclass(frozen=True)
class Options:
    """Options of `prune`.

    Args:
        score: `magnitude` |W_ij|; `wanda` |W_ij| ||X_j||_2 (arXiv 2306.11695, eq. 1); `sparsegpt` w^2 / [H^-1]_jj with
            the update of what remains (arXiv 2301.00774).
        pattern: `2:4`, `4:8` (kept of consecutive inputs of a row), or `unstructured`.
        sparsity: share that is cut, above 0 and below 1; unstructured only.
        allocation: of an unstructured sparsity over the blocks: `uniform`, or `owl`, which spares blocks with many
            outliers (arXiv 2310.05175).
    """

    score: str
    pattern: str
    sparsity: float | None = None
    allocation: str = "uniform"

    def __post_init__(self) -> None:
        one_of("prune.score", self.score, ("magnitude", "wanda", "sparsegpt"))
        one_of("prune.pattern", self.pattern, (*PATTERNS, "unstructured"))
        one_of(
            "prune.allocation", self.allocation, ("uniform", "owl") if self.pattern == "unstructured" else ("uniform",)
        )
        if self.pattern == "unstructured":
            share("prune.sparsity", self.sparsity)
        elif self.sparsity is not None:
            raise CaloraError("prune.sparsity", f"none: {self.pattern} says it", self.sparsity, FIX)


def check(model: PreTrainedModel, options: Options) -> None:
    """Raise `CaloraError` if a width does not hold whole groups."""
    if options.pattern in PATTERNS:
        size = PATTERNS[options.pattern][1]
        for name, layer in linear_layers(model).items():
            if layer.in_features % size:
                raise CaloraError(
                    f"prune {name} to {options.pattern}",
                    f"a width divisible by {size}",
                    layer.in_features,
                    "use `pattern: unstructured`",
                )


def plan(model: PreTrainedModel, options: Options, examples: Sequence[Example]) -> Plan:
    """Block -> sparsity, of an unstructured pattern."""
    return Plan(allocate(model, options, examples) if options.pattern == "unstructured" else {})


def change(block: Block, options: Options, plan: Plan) -> Change:
    """Prune every linear layer of the block; what is kept is stored with one bit a weight that says where it is."""
    made = Change()
    choose, span = chooser(options, plan.values.get(block.name, 0.0))
    for group in block.groups():
        moment = block.moments()[next(iter(group))]
        for name, (weight, keep) in _pruned(group, moment, options.score, choose, span).items():
            packing = Packing("native", sparse=True)
            made.modules[name] = PackedLinear.pack(group[name], packing, weight=weight, keep=keep, dtype=block.dtype)
            made.notes[name] = {"kept": round(float(keep.float().mean()), 6)}
    return made


def _pruned(
    group: dict[str, nn.Linear], moment: Tensor, score: str, choose: Choose, span: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer -> (values, pattern), both [out, in], of layers that read the same input; each has a share of its own."""
    weights = {name: layer.weight.detach() for name, layer in group.items()}
    if score == "sparsegpt":
        sizes = [len(weight) for weight in weights.values()]

        def by_layer(scores: Tensor) -> Tensor:  # [out of all, n]
            return torch.cat([choose(part) for part in scores.split(sizes)])

        values, keep = sparsegpt(torch.cat(list(weights.values())), moment, by_layer, span)
        return dict(zip(group, zip(values.split(sizes), keep.split(sizes), strict=True), strict=True))
    norms = moment.diagonal().sqrt() if score == "wanda" else torch.ones_like(moment.diagonal())
    return {name: (weight, choose(weight.float().abs() * norms)) for name, weight in weights.items()}


def chooser(options: Options, sparsity: float) -> tuple[Choose, int]:
    """Which scores [out, n] to keep, and how many columns SparseGPT decides on at a time."""
    if options.pattern in PATTERNS:
        kept, size = PATTERNS[options.pattern]
        return lambda score: keep_n_of_m(score, kept, size), size
    by_row = options.score == "wanda"  # Wanda compares within an output, the others within the layer (or span)
    return lambda score: keep_highest(score, sparsity, by_row), COLUMNS


def keep_n_of_m(score: Tensor, kept: int, size: int) -> Tensor:
    """Mask [out, in] of the `kept` highest scores in every group of `size` consecutive inputs."""
    groups = score.view(score.shape[0], -1, size)
    best = groups.topk(kept, dim=-1).indices
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, best, True).view_as(score)


def keep_highest(score: Tensor, sparsity: float, by_row: bool) -> Tensor:
    """Mask [out, in] of all but the lowest share `sparsity` of the scores, in each row or in the whole."""
    scores = score if by_row else score.reshape(1, -1)
    kept = scores.shape[1] - round(sparsity * scores.shape[1])
    best = scores.topk(kept, dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True).view_as(score)


def allocate(model: PreTrainedModel, options: Options, examples: Sequence[Example]) -> dict[str, float]:
    """Block -> sparsity. OWL: S - (D - mean D), D the share of scores above M times their mean, scaled to 2 lambda."""
    assert options.sparsity is not None
    names = [f"{stack}.{index}" for stack, blocks in stacks(model).items() for index in range(len(blocks))]
    if options.allocation == "uniform":
        return dict.fromkeys(names, options.sparsity)
    blocks, layers, found = blocks_of(model), linear_layers(model), []
    with blocks.passing():
        sums = input_square_sums(model, examples)
    for name in names:
        own = [key for key in sums if key.startswith(f"{name}.")]
        with blocks.present(name):
            found.append(_outliers([layers[key] for key in own], [sums[key] for key in own]))
    shares = torch.tensor(found)
    spread = (shares - shares.min()) / (shares.max() - shares.min()).clamp_min(1e-12) * 2 * SPREAD
    sparsity = (options.sparsity - (spread - spread.mean())).clamp(0.01, 0.99)
    return dict(zip(names, sparsity.tolist(), strict=True))


def _outliers(layers: Sequence[nn.Linear], sums: Sequence[Tensor]) -> float:
    scores = torch.cat(
        [
            (layer.weight.detach().float().abs() * total.sqrt()).flatten()
            for layer, total in zip(layers, sums, strict=True)
        ]
    )
    return float((scores > OUTLIER * scores.mean()).float().mean())
