"""Carry the teacher's LoRA onto a compressed base and initialise the bypass.

Reads models/base, models/teacher/<task>, models/compressed/<recipe>, data/<task>; writes models/inherited/<task>/<recipe>.
"""

from __future__ import annotations

import torch

from calora.adapters.cards import plain_card
from calora.adapters.folder import read_plain_lora, write_adapter
from calora.common.artifacts import fingerprint
from calora.compressed import load
from calora.inheritance.inherit import Bypass, inherit
from calora.models.loading import load_model
from calora.models.tasks import encode_all
from stages.common import BASE, adapter, compressed, run, teacher
from stages.config import Params
from stages.splits import read_split, read_task


def main(params: Params, name: str, recipe: str) -> None:
    """The adapter that distillation starts from."""
    task, options = read_task(name), params.inherit
    model = load(compressed(recipe))
    origin = read_plain_lora(teacher(name))
    origin.meta = {
        "task": task.to_json(),
        "origin": str(teacher(name)),
        "base_fingerprint": fingerprint(BASE),
        "compressed_fingerprint": model.calora_fingerprint,
        "recipe": recipe,
        "steps": params.compressions[recipe],
        "rank": options.rank,
    }
    rows = read_split(name, "train")[: options.calibration_texts]
    calibration = encode_all(task, model.calora_tokenizer, rows)
    inherited, report = inherit(
        model, origin, lora="inherited" if options.lora else "fresh", calibration=calibration, origin=model.calora_origin,
        bypass=Bypass(options.targets, options.rank, options.activation, options.start) if options.bypass else None,
        reference=load_model(BASE, torch.bfloat16), seed=params.seed,
    )  # fmt: skip
    out = adapter("inherited", name, recipe)
    base = str(compressed(recipe))
    write_adapter(out, inherited, base, plain_card(task, base), torch.bfloat16, {"inherit.json": report.to_json()})
    if report.dropped:
        print(f"{len(report.dropped)} LoRA tensors dropped: their layers were cut")
    errors = list(report.errors.values())
    print(f"{name} on {recipe}: {len(report.mapped)} LoRA layers mapped, {len(errors)} bypasses", end="")
    if errors:
        before, after = (sum(column) / len(errors) for column in zip(*errors, strict=True))
        print(f"; relative error of a layer's output {before:.3f}, with the start {after:.3f}", end="")
    print()


if __name__ == "__main__":
    run(main)
