"""What a recipe makes of a model, from shapes alone: whether it can be applied, its bytes, and the work of its steps."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from calora.compression import STEPS, Recipe, check_recipe
from calora.compression.quantize import Scheme
from calora.layers.packed import BITS
from calora.models.anatomy import check_known, feed_forward, heads, stacks, words_of_all
from calora.preview.outline import Outline

NF4_TABLES = 1250  # bytes beside the codes of each nf4 layer, bitsandbytes' own
NATIVE = 2  # bytes of a number in the dtype of the base (bf16)
# Work of a step in units of sum(out in^2) + sum(in^3) multiplications, from the seconds of SmolLM2-135M on an AMD EPYC
# (docs/compression.md): loops over columns take more than their multiplications.
GPTQ, SPARSEGPT, SEARCH, FACTORS, CUTTING, MOMENTS = 5.0, 8.0, 2.0, 2.5, 2.0, 0.5
LAST = ("o_proj", "out_proj", "o", "wo", "dense", "down_proj", "fc2", "dense_4h_to_h")  # they read what others made


@dataclass(frozen=True)
class Preview:
    """A recipe on a model.

    Args:
        bytes: of model.safetensors; within 2 % for what does not depend on values.
        second_order: multiplications of the steps that look at second moments, weighted by what they cost.
        tuned: options of the recovery's tuning, or None.
    """

    bytes: int
    second_order: float
    tuned: Any


def read_together(layers: Mapping[str, nn.Linear]) -> list[list[str]]:
    """The layers that read one input, told by their names and widths: `calora.models.moments` runs the model for it."""
    groups: dict[tuple[str, int], list[str]] = {}
    for name, layer in layers.items():
        parent, _, part = name.rpartition(".")
        groups.setdefault((name if part in LAST else parent, layer.in_features), []).append(name)
    return list(groups.values())


def check(model: Any, recipe: Recipe) -> list[tuple[str, Any]]:
    """The steps of a recipe, each checked against the sizes that those before it leave; the values are not looked at.

    Raises:
        CaloraError: as `calora.compress` does before any work.
    """
    steps = check_recipe(recipe)
    check_known(model)
    shape = model
    for step, options in steps:
        shape = STEPS[step].check(shape, options) or shape
    return steps


def preview(outline: Outline, recipe: Recipe) -> Preview:
    """What `recipe` makes of a model.

    Raises:
        CaloraError: it cannot be applied.
    """
    steps = check(outline.model, recipe)
    options = dict(steps)
    together = read_together(outline.layers)
    size = _layers(outline, options) + _factors(outline, options, together) + _others(outline, options)
    tuned = options["recover"].tuning if "recover" in options else None
    return Preview(round(size), _work(outline.layers, steps), tuned)


def _layers(outline: Outline, options: Mapping[str, Any]) -> float:
    """Bytes of the linear layers."""
    left, words = _left(outline, options.get("shrink")), words_of_all(outline.model)
    return sum(
        left.get(name, 1.0) * layer.weight.numel() * bits(layer, name, words[name], options) / 8
        for name, layer in outline.layers.items()
    )


def bits(layer: nn.Linear, name: str, words: Collection[str], options: Mapping[str, Any]) -> float:
    """Bits a weight of a layer: codes, scales, zero points, and what says which weights a pattern keeps."""
    pruned, quantised = options.get("prune"), options.get("quantize")
    kept = 1.0
    if pruned is not None:
        kept = 1 - pruned.sparsity if pruned.pattern == "unstructured" else 0.5
    mask = 0.0 if pruned is None else 1.0
    if quantised is None:
        return mask + 8 * NATIVE * kept
    scheme: Scheme = quantised.scheme(name, words)
    if scheme.format == "nf4":
        return 4 + 8 / 64 + 32 / (64 * 256) + 8 * NF4_TABLES / layer.weight.numel()
    group = scheme.group or layer.in_features
    zero = 0 if quantised.symmetric or scheme.format == "int8" else BITS[scheme.format]
    return mask + BITS[scheme.format] * kept + (8 * NATIVE + zero) / group


def _left(outline: Outline, shrink: Any) -> dict[str, float]:
    """Layer -> share of it that `shrink` leaves."""
    if shrink is None:
        return {}
    left = dict.fromkeys(outline.layers, 1.0 - shrink.layers)
    for stack, blocks in stacks(outline.model).items():
        for index, block in enumerate(blocks):
            name = f"{stack}.{index}"
            if shrink.neurons:
                part = feed_forward(name, block)
                for layer in (*part.inputs, part.output):
                    left[layer] *= 1 - shrink.neurons
            if shrink.heads:
                own = heads(name, block)
                for layer in (own.query, own.key, own.value, own.output):
                    left[layer] *= 1 - shrink.heads
    return left


def _factors(outline: Outline, options: Mapping[str, Any], together: Sequence[Sequence[str]]) -> float:
    """Bytes of the base's own recovery: layers that read one input share the first factor."""
    own = options.get("recover")
    if own is None:
        return 0.0
    if own.budget:
        return float(own.budget * 1e6)
    each = 1 if own.format == "int8" else NATIVE
    scale = NATIVE if own.format == "int8" else 0
    total = 0.0
    for group in together:
        layers = [outline.layers[name] for name in group]
        total += layers[0].in_features * (own.rank * each + scale)
        total += sum(layer.out_features * (own.rank * each + scale) for layer in layers)
    return total


def _others(outline: Outline, options: Mapping[str, Any]) -> float:
    """Bytes of what is no linear layer: tables, norms, biases, and the routers of experts."""
    rest = NATIVE * (outline.parameters - outline.linear - outline.tables)
    quantised = options.get("quantize")
    form = "none" if quantised is None else quantised.embeddings
    table = {"none": 8 * NATIVE, "int8": 8 + 8 * NATIVE / outline.width, "int4": 4 + (8 * NATIVE + 4) / 64}[form]
    routers = 0
    if (moefy := options.get("moefy")) is not None:
        routers = outline.blocks * moefy.experts * outline.width * NATIVE
    return rest + outline.tables * table / 8 + routers


def unit(layers: Mapping[str, nn.Linear]) -> float:
    """Multiplications of one look at the second moments of all inputs: sum(out in^2) + sum(in^3)."""
    products = sum(layer.out_features * layer.in_features**2 for layer in layers.values())
    return products + sum(layers[group[0]].in_features ** 3 for group in read_together(layers))


def _work(layers: Mapping[str, nn.Linear], steps: Sequence[tuple[str, Any]]) -> float:
    """Weighted multiplications of the steps that look at second moments of inputs."""
    rounds, cost = 1, 0.0
    for step, options in steps:
        if step == "prune":
            cost += SPARSEGPT if options.score == "sparsegpt" else MOMENTS
        elif step == "quantize":
            cost += (GPTQ if options.rounding == "gptq" else MOMENTS) + (SEARCH if options.range == "search" else 0.0)
        elif step == "recover":
            rounds = options.rounds or 1
            cost += FACTORS
        else:
            cost += CUTTING
    return rounds * cost * unit(layers)
