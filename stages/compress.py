"""Compress the base by one recipe. Reads models/base, data/calibration; writes models/compressed/<recipe>.

How long it took goes to results/compress/<recipe>.json: beside the model it would make every later stage run again.
"""

from __future__ import annotations

import hashlib
import shutil

import torch

from calora.common.artifacts import bytes_on_disk, fingerprint, write_json
from calora.compression import check_recipe, compress, fingerprint_of
from calora.compression.walk import Calibration
from calora.models.loading import load_model, load_tokenizer
from calora.saving import save
from stages.common import BASE, CHECKPOINTS, compressed, results, run
from stages.config import Params
from stages.splits import read_calibration


def main(params: Params, recipe: str) -> None:
    """One compressed base, which serves every task; a killed run goes on after the last finished block."""
    steps = params.compressions[recipe]
    check_recipe(steps)
    examples = read_calibration(load_tokenizer(BASE))
    key = hashlib.sha256(repr((steps, fingerprint(BASE), fingerprint_of(examples))).encode()).hexdigest()
    unfinished = CHECKPOINTS / compressed(recipe)
    model = load_model(BASE, torch.bfloat16)
    report = compress(model, steps, Calibration(examples, unfinished / key))
    seconds = report.pop("seconds")
    save(model, report, compressed(recipe), BASE)
    write_json(results("compress", f"{recipe}.json"), {"seconds": seconds})
    shutil.rmtree(unfinished, ignore_errors=True)
    before, after = bytes_on_disk(BASE), bytes_on_disk(compressed(recipe))
    print(f"{recipe}: {before / 1e6:.1f} MB -> {after / 1e6:.1f} MB ({after / before:.3f})")
    for step, errors in report["blocks"].items():
        worst = max(errors.values(), default=0.0)
        print(f"{step}: {seconds[step]:.0f} s, relative error of a block's output at most {worst:.3f}")


if __name__ == "__main__":
    run(main)
