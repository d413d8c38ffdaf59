"""Make the adapter that a method starts from: whose LoRA, which bypass, scales or none.

Reads models/methods/<method> (start.json, texts.json), models/written/<task>/<method>, models/base, models/teacher/<task>, models/compressed/<recipe>, data/<task>;
writes models/inherited/<task>/<recipe>/<method>.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from calora.adapters.cards import plain_card
from calora.adapters.folder import read_plain_lora, write_adapter
from calora.adapters.lora import Adapter, Rank, check_targets, lora_config
from calora.common.files import fingerprint, read_json
from calora.common.parallel import place
from calora.compressed import Compressed, load
from calora.inheritance.fresh import equal_budget, fresh_adapter
from calora.inheritance.inherit import Bypass, Inheritance, inherit
from calora.inheritance.ranks import share_ranks
from calora.models.anatomy import module_names, named
from calora.models.loading import load_model
from calora.models.tasks import Row, encode_all, positions
from calora.saving import REPORT
from stages.common import BASE, METHODS, compressed, inherited, run, teacher
from stages.config import Bypass as Bypassed
from stages.config import Params, Start
from stages.splits import read_split, read_task, read_written, texts_of


def main(params: Params, name: str, recipe: str, method: str) -> None:
    """The start of one method for one task on one compressed base."""
    start = read_start(method)
    task, model = read_task(name), load(compressed(recipe))
    rows = read_written(name, method) if texts_of(method) == "written" else read_split(name, "train")
    made, report = start_of(start, model, name, params.seed, rows)
    made.meta = {
        "task": task.to_json(), "method": method, "origin": str(teacher(name)), "base_fingerprint": fingerprint(BASE),
        "compressed_fingerprint": model.calora_fingerprint, "recipe": recipe,
        "steps": read_json(compressed(recipe) / REPORT, f"run `dvc repro compress@{recipe}`")["recipe"], **made.meta,
    }  # fmt: skip
    out, base = inherited(name, recipe, method), str(compressed(recipe))
    write_adapter(out, made, base, plain_card(task, base), torch.bfloat16, {"inherit.json": report.to_json()})
    print(f"{method}: {name} on {recipe}, {made.parameters / 1e6:.2f} M parameters", end="")
    if report.errors:
        before, after = (sum(column) / len(report.errors) for column in zip(*report.errors.values(), strict=True))
        print(f"; relative error of a layer's output {before:.3f}, with the start {after:.3f}", end="")
    print(f"; {len(report.dropped)} LoRA tensors dropped: their layers were cut" if report.dropped else "")


def read_start(method: str) -> Start:
    """The start of a method, in full; `budget` holds another start."""
    return Start.model_validate(read_json(METHODS / method / "start.json", "run `dvc repro methods`"))


def start_of(
    start: Start, model: Compressed, name: str, seed: int, rows: Sequence[Row], shape: bool = False
) -> tuple[Adapter, Inheritance]:
    """The adapter of a start, and what became of the teacher's layers; for its `shape` alone, values that take no data.

    Args:
        rows: texts of the task, of which the first are looked at.
    """
    if isinstance(start.budget, Start):
        like, report = start_of(start.budget, model, name, seed, rows, shape=True)
        return fresh_adapter(model, equal_budget(like, module_names(model)), {}, seed), report
    lora = start.lora
    if isinstance(lora, str):
        return carried(start, lora, model, name, seed, rows, shape)
    check_targets(model, lora.targets, lora.rank)
    made = fresh_adapter(model, lora_config(lora.rank, lora.lora_alpha, named(model, lora.targets)), {}, seed)
    bare, report = carried(start, "none", model, name, seed, rows, shape)
    return replace(bare, config=made.config, lora=made.lora), report


def carried(
    start: Start, lora: str, model: Compressed, name: str, seed: int, rows: Sequence[Row], shape: bool
) -> tuple[Adapter, Inheritance]:
    """The teacher's LoRA (or a fresh one of its shape, or none) with the bypass and the scales of a start."""
    own, theirs = start.bypass, read_plain_lora(teacher(name))
    data: dict[str, Any] = {"reference": None, "calibration": [], "origin": model.calora_origin}
    fitted = (own is not None and own.start != "zero") or (lora == "inherited" and model.calora_origin.kept)
    if (fitted and not shape) or (own is not None and own.budget is not None):
        first = rows[: start.calibration_texts]
        data["calibration"] = encode_all(read_task(name), model.calora_tokenizer, first, positions(model.config))
        data["reference"] = load_model(BASE)
        place(data["reference"])
    bypass = None
    if own is not None:
        rank = rank_of(own, model, theirs if lora == "inherited" else None, data)
        bypass = Bypass(own.targets, rank, own.activation, "zero" if shape else own.start)
    lora = "fresh" if shape and lora == "inherited" else lora
    return inherit(model, theirs, lora=lora, bypass=bypass, scales=start.scales, seed=seed, **data)


def rank_of(own: Bypassed, model: Compressed, theirs: Adapter | None, data: Mapping[str, Any]) -> Rank:
    """The rank of a bypass, or what a budget gives each layer."""
    if own.budget is None:
        assert own.rank is not None  # one of the two is set
        return own.rank
    return share_ranks(model, theirs, own.targets, own.activation, budget=own.budget, format=own.format, **data)


if __name__ == "__main__":
    run(main)
