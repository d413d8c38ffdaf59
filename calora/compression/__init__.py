"""Compress a model by a recipe: an ordered list of steps, each a file of this package and a line of `STEPS`."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from calora.compression import moefy, prune, quantize, shrink
from calora.compression.options import FIX
from calora.compression.walk import Calibration, check_finite
from calora.errors import CaloraError
from calora.layers.layout import store
from calora.models.tasks import Example

Recipe = Sequence[Mapping[str, Mapping[str, Any]]]


@dataclass(frozen=True)
class Step:
    """A step of a recipe: `check(model, options)` raises before any work; `apply(model, options, calibration)` reports.

    Args:
        after: the steps that it may not follow with these options, and why.
    """

    check: Callable[[PreTrainedModel, dict[str, Any]], None]
    apply: Callable[[PreTrainedModel, dict[str, Any], Calibration], dict[str, Any]]
    after: Callable[[Mapping[str, Any]], Mapping[str, str]]


CODES = {"quantize": "codes of quantised weights cannot be changed"}
NO_PATTERN = {"prune": "bitsandbytes stores no pattern; use int8 or int4"}
STEPS: dict[str, Step] = {
    "shrink": Step(shrink.check, shrink.shrink, lambda _: CODES | {
        "moefy": "experts would lose their equal sizes", "prune": "cutting inputs would break the groups of a pattern",
    }),
    "moefy": Step(moefy.check, moefy.moefy, lambda _: CODES | {
        "moefy": "its feed-forwards are experts already", "prune": "reordering neurons would break the groups of a pattern",
    }),
    "prune": Step(prune.check, prune.prune, lambda _: CODES | {"prune": "the second pattern would undo the first"}),
    "quantize": Step(quantize.check, quantize.quantize, lambda options: CODES | (
        NO_PATTERN if options.get("format") == "nf4" else {}
    )),
}  # fmt: skip


def compress(model: PreTrainedModel, recipe: Recipe, calibration: Calibration) -> dict[str, Any]:
    """Compress `model` in place, step by step, and report what became of every tensor.

    Args:
        model: an uncompressed model as `calora.models.families.load_model` gives it.
        recipe: such as `[{"prune": {"score": "wanda", "pattern": "2:4"}}, {"quantize": {"format": "int8"}}]`.
        calibration: texts that the steps look at, each block's inputs from the blocks that are compressed already.

    Returns:
        The report: `recipe`, `calibration`, `layers` (name -> how it is stored, bytes before and after, what each step
        says of it), `blocks` (step -> block -> relative error of its output), `seconds` (step -> time), `untouched`
        (name -> bytes of each tensor that was left as it was), `layers_kept` (stack -> the layers that remain, where
        some were cut), and `kept` (`<layer>.rows` / `<layer>.columns` -> what remains of the original's outputs and
        inputs, in their new order; tensors, for `calora.compressed.save`).

    Raises:
        CaloraError: a step is unknown, cannot follow the one before it or cannot be applied (raised before any work
            starts), or weights or activations hold NaN or Inf.
    """
    steps = check_recipe(recipe)
    for step, options in steps:
        STEPS[step].check(model, options)
    if not calibration.examples:
        raise CaloraError("calibration", "at least one text", "none", "raise compress.calibration.texts")
    before = {name: tensor.nbytes for name, tensor in model.state_dict().items()}
    for name, tensor in model.state_dict().items():
        check_finite(name, tensor)
    report: dict[str, Any] = {"layers": {}, "blocks": {}, "seconds": {}, "kept": {}, "layers_kept": {}}
    for number, (step, options) in enumerate(steps):
        start = time.monotonic()
        folder = calibration.checkpoint / f"{number}-{step}" if calibration.checkpoint else None
        done = STEPS[step].apply(model, options, Calibration(calibration.examples, folder))
        report["seconds"][step] = round(time.monotonic() - start, 1)
        report["blocks"][step] = done["blocks"]
        report["layers_kept"] |= done.get("layers_kept", {})
        for name, note in done["layers"].items():
            report["layers"].setdefault(name, {})[step] = note
        for name, indices in done["kept"].items():
            earlier = report["kept"].get(name)
            report["kept"][name] = indices if earlier is None else earlier[indices]
    return _described(model, before, report) | {
        "recipe": [{step: options} for step, options in steps],
        "calibration": {"texts": len(calibration.examples), "sha256": fingerprint_of(calibration.examples)},
    }


def _described(model: nn.Module, before: dict[str, int], report: dict[str, Any]) -> dict[str, Any]:
    """The report with how each changed layer is stored, and its bytes."""
    layers: dict[str, Any] = {}
    owned: set[str] = set()
    for name, notes in report["layers"].items():
        entry, tensors = store(model.get_submodule(name))
        owned |= {f"{name}.{key}" for key in tensors}
        sizes = {
            "bytes_before": before.get(f"{name}.weight", 0),
            "bytes_after": sum(t.nbytes for t in tensors.values()),
        }
        layers[name] = {**entry, **sizes, "steps": notes}
    untouched = {name: tensor.nbytes for name, tensor in model.state_dict().items() if name not in owned}
    return {**report, "layers": layers, "untouched": untouched}


def check_recipe(recipe: Recipe) -> list[tuple[str, dict[str, Any]]]:
    """The steps of a recipe as (name, options); raises `CaloraError` unless each is known and may follow the others."""
    steps: list[tuple[str, dict[str, Any]]] = []
    for item in recipe:
        if not isinstance(item, Mapping) or len(item) != 1 or next(iter(item)) not in STEPS:
            raise CaloraError("recipe", f"steps among {', '.join(STEPS)}", item, FIX)
        step, options = next(iter(item.items()))
        chosen = dict(options or {})
        reasons = STEPS[step].after(chosen)
        for earlier, _ in steps:
            if earlier in reasons:
                raise CaloraError("recipe", f"no {step} after {earlier}", f"one: {reasons[earlier]}", FIX)
        steps.append((step, chosen))
    if not steps:
        raise CaloraError("recipe", "at least one step", "none", FIX)
    return steps


def fingerprint_of(examples: Sequence[Example]) -> str:
    """SHA-256 of the calibration tokens."""
    return hashlib.sha256(json.dumps([e.prompt_ids for e in examples]).encode()).hexdigest()
