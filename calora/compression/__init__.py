"""Compress a model by a recipe: an ordered list of steps, each a file of this package and a line of `STEPS`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from calora.compression.nf4 import dense_nf4
from calora.compression.prune import prune
from calora.compression.quantize import quantize
from calora.errors import CaloraError
from calora.packed import PackedEmbedding, PackedLinear
from calora.tasks import Example

Step = Callable[[Any, dict[str, Any], Sequence[Example]], dict[str, nn.Module]]
Recipe = Sequence[Mapping[str, Mapping[str, Any]]]
STEPS: dict[str, Step] = {"prune": prune, "quantize": quantize}


def compress(model: PreTrainedModel, recipe: Recipe, calibration: Sequence[Example]) -> dict[str, Any]:
    """Compress `model` in place, step by step, and report what became of every tensor.

    Args:
        model: an uncompressed model as `calora.models.load_model` gives it.
        recipe: such as `[{"prune": {"score": "wanda", "pattern": "2:4"}}, {"quantize": {"format": "int8"}}]`.
        calibration: tokenised texts, for the steps that look at activations.

    Returns:
        The report: `recipe`, `calibration`, `layers` (name -> kind, shape, bytes before and after, relative error
        ||W - W'|| / ||W|| of each step), and `untouched` (name -> bytes of each tensor that was left as it was).

    Raises:
        CaloraError: a step is unknown or cannot be applied; the model is then not to be used.
    """
    steps = check_recipe(recipe)
    before = {name: tensor.nbytes for name, tensor in model.state_dict().items()}
    layers: dict[str, dict[str, Any]] = {}
    for step, options in steps:
        replaced = STEPS[step](model, options, calibration)
        for name, new in replaced.items():
            entry = layers.setdefault(name, {"bytes_before": before[f"{name}.weight"], "relative_error": {}})
            entry["relative_error"][step] = relative_error(model.get_submodule(name), new)
            model.set_submodule(name, new)
            entry |= {"bytes_after": sum(t.nbytes for t in new.state_dict().values()), **describe(new)}
    return {
        "recipe": [{step: options} for step, options in steps],
        "calibration": {"texts": len(calibration), "sha256": _fingerprint(calibration)},
        "layers": layers,
        "untouched": {
            name: size
            for name, size in before.items()
            if name.removesuffix(".weight").removesuffix(".bias") not in layers
        },
    }


def check_recipe(recipe: Recipe) -> list[tuple[str, dict[str, Any]]]:
    """The steps of a recipe as (name, options); raises `CaloraError` unless each is a known step."""
    steps: list[tuple[str, dict[str, Any]]] = []
    for item in recipe:
        if not isinstance(item, Mapping) or len(item) != 1 or next(iter(item)) not in STEPS:
            raise CaloraError(
                "recipe", f"steps among {', '.join(STEPS)}", item, "mend compress.<recipe> in params.yaml"
            )
        step, options = next(iter(item.items()))
        steps.append((step, dict(options)))
    if not steps:
        raise CaloraError("recipe", "at least one step", "none", "mend compress.<recipe> in params.yaml")
    return steps


def describe(layer: nn.Module) -> dict[str, Any]:
    """What is needed to build an empty layer of the same kind."""
    if isinstance(layer, PackedEmbedding):
        return {"kind": "embedding", "rows": layer.num_embeddings, "width": layer.embedding_dim, "format": "int8"}
    assert isinstance(layer, nn.Linear)
    packing = (
        {"kind": "packed", "pattern": layer.pattern, "format": layer.format}
        if isinstance(layer, PackedLinear)
        else {"kind": "nf4", "pattern": "dense", "format": "nf4"}
    )
    return packing | {"in": layer.in_features, "out": layer.out_features, "bias": layer.bias is not None}


def dense_weight(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """The dense view of any layer's weight."""
    if isinstance(layer, PackedLinear | PackedEmbedding):
        return layer.dense_weight(dtype)
    if type(layer).__name__ == "Linear4bit":
        return dense_nf4(layer, dtype)
    return layer.get_parameter("weight").detach().to(dtype)


def relative_error(old: nn.Module, new: nn.Module) -> float:
    """||W - W'||_F / ||W||_F of two layers' weights."""
    before, after = dense_weight(old, torch.float32), dense_weight(new, torch.float32)
    return round(float((before - after).norm() / before.norm().clamp_min(1e-30)), 6)


def _fingerprint(calibration: Sequence[Example]) -> str:
    return hashlib.sha256(json.dumps([e.prompt_ids for e in calibration]).encode()).hexdigest()
