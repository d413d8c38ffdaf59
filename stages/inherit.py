"""Make the adapters that methods start from, of one task on one compressed base: whose LoRA, which bypass, scales or none.

Reads models/starts, models/written/<task>, models/base, models/teacher/<task>, models/compressed/<recipe>, data/<task>;
writes models/inherited/<task>/<recipe>: a folder for each method.

All methods at once, because most of the work is a look at the uncompressed model that they share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from calora.adapters.cards import plain_card
from calora.adapters.folder import read_plain_lora, write_adapter
from calora.adapters.lora import Adapter, Rank, check_targets, lora_config
from calora.common.files import fingerprint, read_json, whole_directory
from calora.common.parallel import place
from calora.compressed import Compressed, load
from calora.inheritance.fresh import equal_budget, fresh_adapter
from calora.inheritance.inherit import Bypass, Inheritance, inherit
from calora.inheritance.ranks import share_ranks
from calora.models.anatomy import module_names, named
from calora.models.loading import load_model
from calora.models.tasks import Row, encode_all, positions
from calora.saving import REPORT
from stages.common import BASE, STARTS, compressed, inherited, run, teacher
from stages.config import Bypass as Bypassed
from stages.config import Params, Start
from stages.splits import read_split, read_task, read_written


def main(params: Params, name: str, recipe: str) -> None:
    """The start of every method that is compared."""
    task, model, base = read_task(name), load(compressed(recipe)), str(compressed(recipe))
    about = {
        "origin": str(teacher(name)), "base_fingerprint": fingerprint(BASE),
        "compressed_fingerprint": model.calora_fingerprint, "recipe": recipe,
        "steps": read_json(compressed(recipe) / REPORT, f"run `dvc repro compress@{recipe}`")["recipe"],
    }  # fmt: skip
    of_task = Starts(model, name, params.seed, read_split(name, "train"))
    with whole_directory(inherited(name, recipe)) as scratch:
        for method in sorted(file.stem for file in STARTS.glob("*.json")):
            start, texts = read_start(method)
            written = texts == "written"
            starts = Starts(model, name, params.seed, read_written(name, method)) if written else of_task
            made, report = starts.of(start)
            made = replace(made, meta={"task": task.to_json(), "method": method, **about, **made.meta})
            notes = {"inherit.json": report.to_json()}
            write_adapter(scratch / method, made, base, plain_card(task, base), torch.bfloat16, notes)
            print(f"{method}: {name} on {recipe}, {told(made, report)}", flush=True)


def read_start(method: str) -> tuple[Start, str]:
    """The start of a method, in full, and which texts it knows; `budget` holds another start."""
    found = read_json(STARTS / f"{method}.json", "run `dvc repro methods`")
    return Start.model_validate(found["start"]), str(found["texts"])


def told(made: Adapter, report: Inheritance) -> str:
    """What a start is, in a line."""
    line = f"{made.parameters / 1e6:.2f} M parameters"
    if report.errors:
        before, after = (sum(column) / len(report.errors) for column in zip(*report.errors.values(), strict=True))
        line += f"; relative error of a layer's output {before:.3f}, with the start {after:.3f}"
    return line + (f"; {len(report.dropped)} LoRA tensors dropped: their layers were cut" if report.dropped else "")


@lru_cache(maxsize=1)
def reference(base: Path) -> PreTrainedModel:
    """The uncompressed model."""
    model = load_model(base)
    place(model)
    return model


class Starts:
    """Makes starts for one compressed base from the same texts; what several of them have in common is made once.

    Args:
        name: of the task.
        rows: texts of the task, of which the first are looked at.
    """

    def __init__(self, model: Compressed, name: str, seed: int, rows: Sequence[Row]) -> None:
        self.model, self.name, self.seed, self.rows = model, name, seed, rows
        self._made: dict[tuple[str, bool], tuple[Adapter, Inheritance]] = {}
        self._ranks: dict[object, Rank] = {}
        self._moments: dict[object, dict[str, Tensor]] = {}

    def of(self, start: Start, shape: bool = False) -> tuple[Adapter, Inheritance]:
        """The adapter of a start, and what became of the teacher's layers; for its `shape` alone, values that take no data."""
        key = start.model_dump_json()
        if shape and (key, False) in self._made:
            return self._made[key, False]
        if (key, shape) not in self._made:
            self._made[key, shape] = self._of(start, shape)
        return self._made[key, shape]

    def _of(self, start: Start, shape: bool) -> tuple[Adapter, Inheritance]:
        if isinstance(start.budget, Start):
            like, report = self.of(start.budget, shape=True)
            return fresh_adapter(self.model, equal_budget(like, module_names(self.model)), {}, self.seed), report
        lora = start.lora
        if isinstance(lora, str):
            return self._carried(start, lora, shape)
        check_targets(self.model, lora.targets, lora.rank)
        config = lora_config(lora.rank, lora.lora_alpha, named(self.model, lora.targets))
        made = fresh_adapter(self.model, config, {}, self.seed)
        bare, report = self._carried(start, "none", shape)
        return replace(bare, config=made.config, lora=made.lora), report

    def _carried(self, start: Start, lora: str, shape: bool) -> tuple[Adapter, Inheritance]:
        """The teacher's LoRA (or a fresh one of its shape, or none) with the bypass and the scales of a start."""
        own, theirs, origin = start.bypass, read_plain_lora(teacher(self.name)), self.model.calora_origin
        data: dict[str, Any] = {"reference": None, "calibration": [], "origin": origin}
        fitted = (own is not None and own.start != "zero") or (lora == "inherited" and origin.kept)
        if (fitted and not shape) or (own is not None and own.budget is not None):
            data |= self._look(start.calibration_texts, lora)
        bypass = None
        if own is not None:
            rank = self._rank(own, lora, theirs, data)
            bypass = Bypass(own.targets, rank, own.activation, "zero" if shape else own.start)
        lora = "fresh" if shape and lora == "inherited" else lora
        return inherit(self.model, theirs, lora=lora, bypass=bypass, scales=start.scales, seed=self.seed, **data)

    def _look(self, texts: int, lora: str) -> dict[str, Any]:
        """The first texts, what is to look at them, and what an earlier look found."""
        rows, limit = self.rows[:texts], positions(self.model.config)
        examples = encode_all(read_task(self.name), self.model.calora_tokenizer, rows, limit)
        moments = self._moments.setdefault((texts, lora == "inherited"), {})
        return {"reference": reference(BASE.resolve()), "calibration": examples, "moments": moments}

    def _rank(self, own: Bypassed, lora: str, theirs: Adapter, data: dict[str, Any]) -> Rank:
        """The rank of a bypass, or what a budget gives each layer."""
        if own.budget is None:
            assert own.rank is not None  # one of the two is set
            return own.rank
        key = (own.model_dump_json(), lora == "inherited", len(data["calibration"]))
        if key not in self._ranks:
            taught = theirs if lora == "inherited" else None
            self._ranks[key] = share_ranks(
                self.model, taught, own.targets, own.activation, budget=own.budget, format=own.format, **data
            )
        return self._ranks[key]


if __name__ == "__main__":
    run(main)
