"""Compress a model by a recipe: an ordered list of steps, each a file of this package and a line of `STEPS`."""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from calora.common.tensors import same_memory
from calora.compression import moefy, prune, quantize, recover, shrink, take, tune
from calora.compression.options import FIX, Plan, parse
from calora.compression.streamed import Streamed
from calora.compression.walk import Calibration, Change, Part, Walked, check_finite, each_block
from calora.errors import CaloraError
from calora.layers.layout import store
from calora.layers.precision import computing_in
from calora.layers.report import Report
from calora.models.anatomy import check_known
from calora.models.blocks import blocks_of
from calora.models.families import family_of
from calora.models.loading import compute_dtype
from calora.models.tasks import Example

Recipe = Sequence[Mapping[str, Mapping[str, Any]]]


@dataclass(frozen=True)
class Step:
    """A step of a recipe.

    Args:
        options: a dataclass that checks itself.
        check: (model, options) -> the empty model of the new sizes, if they change; raises before any work starts.
        changes: what it does to a block, one after another: (block, options, plan) -> change.
        after: the steps that it may not follow with these options, and why.
        plan: (model, options, examples) -> what it has to find out of the whole model before any block is changed.
        finish: (model, options, plan) -> the modules that it changed after all blocks.
        whole: options -> the one for which the whole model has to be in memory, with its name; empty for none.
    """

    options: type[Any]
    check: Callable[[PreTrainedModel, Any], PreTrainedModel | None]
    changes: tuple[Callable[..., Change], ...]
    after: Callable[[Any], Mapping[str, str]]
    plan: Callable[..., Plan] = lambda *_: Plan()
    finish: Callable[[PreTrainedModel, Any, Plan], list[str]] = lambda *_: []
    whole: Callable[[Any], str] = lambda _: ""


LAST = {"recover": "its map was fitted to what the steps before it left"}
CODES = {
    "quantize": "codes of quantised weights cannot be changed",
    "take": "what was taken is compressed already, and stays as it is",
} | LAST
NO_PATTERN = {"prune": "bitsandbytes stores no pattern; use int8 or int4"}
STEPS: dict[str, Step] = {
    "take": Step(
        take.Options, take.check, (take.change,),
        lambda _: {step: "it takes the place of the base's weights: begin with it" for step in STEPS}, take.plan, take.finish,
        lambda _: "take, whose checkpoint is opened as a whole",
    ),
    "shrink": Step(
        shrink.Options, shrink.check, (shrink.cut_heads, shrink.cut_neurons), lambda _: CODES | {
            "shrink": "one step cuts layers, heads and neurons together",
            "moefy": "experts would lose their equal sizes", "prune": "cutting inputs would break the groups of a pattern",
        }, shrink.plan, shrink.finish, shrink.needs_whole,
    ),
    "moefy": Step(moefy.Options, moefy.check, (moefy.change,), lambda _: CODES | {
        "moefy": "its feed-forwards are experts already", "prune": "reordering neurons would break the groups of a pattern",
    }),
    "prune": Step(
        prune.Options, prune.check, (prune.change,),
        lambda _: CODES | {"prune": "the second pattern would undo the first"}, prune.plan,
    ),
    "quantize": Step(
        quantize.Options, quantize.check, (quantize.change,),
        lambda options: CODES | (NO_PATTERN if options.format == "nf4" else {}), finish=quantize.finish,
    ),
    "recover": Step(
        recover.Options, recover.check, (recover.change,), lambda options: LAST | (
            {"shrink": "a budget needs the widths of before; give it a rank"} if options.budget else {}
        ) | ({} if options.fit == "after" else {"take": "codes that were taken follow no map; set `fit: after`"}),
        recover.plan, whole=recover.needs_whole,
    ),
}  # fmt: skip


def compress(
    model: PreTrainedModel, recipe: Recipe, calibration: Calibration, compute: torch.dtype | None = None
) -> Report:
    """Compress `model` in place, block by block, and report what became of every tensor.

    A block gets all steps before the next one is looked at, with inputs from blocks that are compressed in full. A model
    that was compressed before goes on from there, and its report covers both.

    Args:
        model: as `calora.models.loading.load_model` gives it, in the dtype in which it will be stored; or as
            `open_streamed` does, block by block: its blocks end on disk too, where `calora.save` finds them.
        recipe: such as `[{"prune": {"score": "wanda", "pattern": "2:4"}}, {"quantize": {"format": "int8"}}]`.
        calibration: texts that the steps look at, and those that a recovery is tuned on. For that a copy of the uncompressed
            model stays in memory.
        compute: the dtype in which blocks compute meanwhile; by default the model's own, or fp32 for a bf16 model where
            the processor has no kernels for it. What is stored is rounded to the model's own all the same.

    Raises:
        CaloraError: a step is unknown, cannot follow the one before it or cannot be applied, or calora does not know
            the model's blocks (raised before any work starts); or weights, activations or the loss of a tuning hold
            NaN or Inf.
    """
    earlier: Report | None = getattr(model, "calora_report", None)
    steps = check_recipe(recipe, earlier.recipe if earlier else ())
    if isinstance(blocks_of(model), Streamed):
        check_streamed(steps, calibration, earlier)
    check_model(model, steps)
    if not calibration.examples:
        raise CaloraError("calibration", "at least one text", "none", "give it texts")
    tuned = [options for step, options in steps if step == "recover" and options.tuning]
    if tuned:
        tune.divided(calibration.tuning)  # before hours of work
    before = {name: tensor.nbytes for name, tensor in model.state_dict().items()}
    stored = model.dtype
    precision = partial(computing_in, model, compute or _fast(stored), stored)
    with precision():
        teacher = copy.deepcopy(model) if tuned else None
        plans, parts, spent = _planned(model, steps, calibration.examples, stored)
        found = each_block(model, parts, calibration, stored)
    for what, seconds in spent.items():
        found.took(what, seconds)
    for (step, options), plan in zip(steps, plans, strict=True):
        start = time.monotonic()
        for name in STEPS[step].finish(model, options, plan):
            found.layers[name] = {step: {}}
        found.took(step, time.monotonic() - start)
    notes = {}
    if teacher is not None:
        start = time.monotonic()
        with precision():
            notes = _tuned(model, teacher, calibration, tuned[0], stored)
        found.took("tune", time.monotonic() - start)
    made = _report(model, recipe, calibration.examples, plans, found, before, notes).continues(earlier)
    model.calora_report = made  # type: ignore[assignment]  # no module: what a second compression continues
    return made


def check_recipe(recipe: Recipe, done: Recipe = ()) -> list[tuple[str, Any]]:
    """The steps of a recipe as (name, options).

    Args:
        done: what the model went through before.

    Raises:
        CaloraError: a step is unknown, an option is wrong, or a step may not follow the others.
    """
    steps: list[tuple[str, Any]] = []
    earlier = [next(iter(item)) for item in done]
    for item in recipe:
        if not isinstance(item, Mapping) or len(item) != 1 or next(iter(item)) not in STEPS:
            raise CaloraError("recipe", f"steps among {', '.join(STEPS)}", item, FIX)
        step, given = next(iter(item.items()))
        options = parse(STEPS[step].options, step, given or {})
        for name, reason in STEPS[step].after(options).items():
            if name in earlier:
                raise CaloraError("recipe", f"no {step} after {name}", f"one: {reason}", FIX)
        if step == "recover" and not {name for name, _ in steps} & set(recover.JOINT):
            raise CaloraError("recipe", f"recover after {' or '.join(recover.JOINT)}", "none before it", FIX)
        steps.append((step, options))
        earlier.append(step)
    if not steps:
        raise CaloraError("recipe", "at least one step", "none", FIX)
    return steps


def check_model(model: PreTrainedModel, steps: Sequence[tuple[str, Any]]) -> None:
    """Raise `CaloraError` unless all steps can be applied to the model, and its weights are finite.

    Each step is checked against the sizes that the steps before it leave.
    """
    family_of(model)
    if not hasattr(model, "calora_report"):
        check_known(model)
    shape = model
    for step, options in steps:
        shape = STEPS[step].check(shape, options) or shape
    for tensors in blocks_of(model).states():
        for name, tensor in tensors.items():
            check_finite(name, tensor)


def needs_whole(steps: Sequence[tuple[str, Any]]) -> str:
    """What in a recipe needs the whole model in memory, so that it cannot be streamed; empty for nothing."""
    return ", ".join(filter(None, (STEPS[step].whole(options) for step, options in steps)))


def check_streamed(steps: Sequence[tuple[str, Any]], calibration: Calibration, earlier: Report | None) -> None:
    """Raise `CaloraError` unless a streamed model can be compressed so."""
    if reason := needs_whole(steps):
        expected = "steps that look at one block at a time, for a streamed model"
        raise CaloraError("recipe", expected, reason, "leave it out, or open the whole model with load_model")
    if calibration.checkpoint is None or earlier:
        found = "a second compression" if earlier else "none"
        fix = "give it a Calibration with a folder for finished blocks, and all steps in one recipe"
        raise CaloraError("compress", "a checkpoint for the blocks of a streamed model", found, fix)


def _fast(stored: torch.dtype) -> torch.dtype:
    """The dtype to compute in: no other one holds what fp16 and fp32 do."""
    return compute_dtype() if stored == torch.bfloat16 else stored


def _planned(
    model: PreTrainedModel, steps: Sequence[tuple[str, Any]], examples: Sequence[Example], stored: torch.dtype
) -> tuple[list[Plan], list[Part], dict[str, float]]:
    """What the steps find out of the whole model, what is done to each block, and the seconds that each step took by now.

    A recovery goes through the steps that it is fitted together with itself.
    """
    plans: list[Plan] = []
    parts: list[Part] = []
    spent: dict[str, float] = {}
    for step, options in steps:
        start, joint = time.monotonic(), {}
        if step == "recover":
            joint = {"steps": [part for part in parts if part[0] in recover.JOINT]}
            parts = [part for part in parts if part[0] not in recover.JOINT]
        more = joint | ({"dtype": stored} if joint else {})
        plans.append(STEPS[step].plan(model, options, examples, **more))
        parts += [(step, partial(change, options=options, plan=plans[-1], **joint)) for change in STEPS[step].changes]
        spent[step] = time.monotonic() - start
    return plans, parts, spent


def _tuned(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    calibration: Calibration,
    options: recover.Options,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Tune the recovery; what the report says of it."""
    assert options.tuning
    texts = calibration.tuning
    errors = tune.tune(model, teacher, texts, options.tuning, options.format, dtype)
    return {"texts": len(texts), "sha256": fingerprint_of(texts), "divergence": errors}


def _report(
    model: nn.Module,
    recipe: Recipe,
    examples: Sequence[Example],
    plans: Sequence[Plan],
    found: Walked,
    before: Mapping[str, int],
    tuned: dict[str, Any],
) -> Report:
    """The report, with how each changed layer is stored, and its bytes."""
    layers: dict[str, Any] = {}
    owned: set[str] = set()
    counted: set[int] = set()  # a map that several layers share counts once
    for name, notes in found.layers.items():
        entry, tensors = store(model.get_submodule(name))
        owned |= {f"{name}.{key}" for key in tensors}
        sizes = {
            "bytes_before": before.get(f"{name}.weight", 0),
            "bytes_after": sum(t.nbytes for t in tensors.values() if same_memory(t) not in counted),
        }
        counted |= {same_memory(t) for t in tensors.values()}
        layers[name] = {**entry, **sizes, "steps": notes}
    seconds = {what: round(value, 1) for what, value in found.seconds.items()}
    return Report(
        recipe=[{step: dict(options or {})} for item in recipe for step, options in item.items()],
        calibration={"texts": len(examples), "sha256": fingerprint_of(examples)},
        tuned=tuned,
        layers=layers,
        blocks=found.blocks,
        untouched={name: tensor.nbytes for name, tensor in model.state_dict().items() if name not in owned},
        layers_kept={stack: kept for plan in plans for stack, kept in plan.layers_kept.items()},
        kept={**found.kept, **{name: tensor for plan in plans for name, tensor in plan.kept.items()}},
        taken={key: value for plan in plans for key, value in plan.taken.items()},
        seconds=seconds | {"all": round(sum(found.seconds.values()), 1)},
    )


def fingerprint_of(examples: Sequence[Example]) -> str:
    """SHA-256 of the tokens of texts."""
    return hashlib.sha256(json.dumps([e.prompt_ids for e in examples]).encode()).hexdigest()
