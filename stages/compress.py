"""Compress the base by one recipe. Reads models/base, data/calibration, models/taken; writes models/compressed/<recipe>.

How long it took goes to results/compress/<recipe>.json: beside the model it would make every later stage run again.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import torch
from transformers import PreTrainedModel

import calora
from calora.common.files import bytes_on_disk, fingerprint, read_json, sha256, write_json
from calora.common.parallel import device, place
from calora.compression import Recipe, check_recipe, compress, fingerprint_of, needs_whole
from calora.compression.streamed import open_streamed
from calora.compression.walk import Calibration
from calora.errors import CaloraError
from calora.models.loading import compute_dtype, load_model, load_tokenizer
from calora.saving import save
from stages.common import BASE, CHECKPOINTS, TAKEN, TUNING, compressed, results, run
from stages.config import Params
from stages.splits import read_calibration

CODE = ("compression", "layers", "models", "recovery", "taken")  # rooms of calora that decide what a finished block is


def main(params: Params, recipe: str) -> None:
    """One compressed base, which serves every task; a killed run goes on after the last finished block.

    A killed tuning starts anew.
    """
    try:
        _compress(params.compressions[recipe], recipe)
    except CaloraError as error:
        error.args = (f"compress.{recipe} in params.yaml: {error}",)
        raise


def _compress(steps: list[dict[str, dict[str, object]]], recipe: str) -> None:
    check_recipe(steps)
    tokenizer = load_tokenizer(BASE)
    examples = read_calibration(tokenizer)
    tuned = any((options or {}).get("tune") for step in steps for options in step.values())
    tuning = read_calibration(tokenizer, TUNING) if tuned else []
    takes = any("take" in step for step in steps)
    noted = read_json(TAKEN / f"{recipe}.json", "run `dvc repro taken`")["files"] if takes else {}
    parts = (steps, fingerprint(BASE), fingerprint_of(examples), code_digest(), compute_dtype(), noted)
    unfinished = CHECKPOINTS / compressed(recipe)
    key = hashlib.sha256(repr(parts).encode()).hexdigest()
    model = _opened(steps, recipe)
    report = compress(model, steps, Calibration(examples, unfinished / key, tuning), compute_dtype())
    check_unchanged(noted)
    save(model, report, compressed(recipe), BASE)
    write_json(results("compress", f"{recipe}.json"), {"seconds": report.seconds})
    shutil.rmtree(unfinished, ignore_errors=True)
    before, after = bytes_on_disk(BASE), bytes_on_disk(compressed(recipe))
    print(f"{recipe}: {before / 1e6:.1f} MB -> {after / 1e6:.1f} MB ({after / before:.3f})")
    print(", ".join(f"{what} {seconds:.0f} s" for what, seconds in report.seconds.items()))
    print(f"relative error of a block's output at most {max(report.blocks.values()):.3f}")
    if report.taken:
        how = [layer["steps"]["take"]["taken"] for layer in report.layers.values() if "take" in layer["steps"]]
        whose = f"{report.taken['path']} ({report.taken['method']}, {report.taken['bytes'] / 1e6:.1f} MB)"
        print(f"taken from {whose}: {how.count('codes')} of {len(how)} layers as codes, the others as plain values")
    if report.tuned:
        before, after = report.tuned["divergence"]
        print(f"divergence from the base before the recovery was tuned {before:.3f}, after {after:.3f}")


def check_unchanged(noted: dict[str, str]) -> None:
    """Raise unless the checkpoint that was taken is still the one that `taken` looked at."""
    for name, digest in noted.items():
        if not Path(name).exists() or sha256(Path(name)) != digest:
            raise CaloraError(name, f"the file of SHA-256 {digest}", "another one, or none", "run `dvc repro` again")


def _opened(steps: Recipe, recipe: str) -> PreTrainedModel:
    """The base, its blocks read one after another, or in memory as a whole where the recipe or the base needs it."""
    reason = needs_whole(check_recipe(steps))
    try:
        if not reason:
            return open_streamed(BASE, torch.bfloat16, device())
    except CaloraError as error:
        reason = str(error)
    print(f"{recipe}: the whole base is in memory: {reason}")
    model = load_model(BASE, torch.bfloat16)
    place(model)
    return model


def code_digest() -> str:
    """SHA-256 of the code that makes a block: a killed compression never goes on under another."""
    digest = hashlib.sha256()
    for room in CODE:
        for file in sorted((Path(calora.__file__).parent / room).glob("*.py")):
            digest.update(f"{room}/{file.name}\0".encode() + file.read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    run(main)
