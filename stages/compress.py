"""Compress the base by one recipe. Reads models/base, data/calibration; writes models/compressed/<recipe>."""

from __future__ import annotations

import torch

from calora.artifacts import bytes_on_disk
from calora.compressed import save
from calora.compression import check_recipe, compress
from calora.models import load_model, load_tokenizer
from calora.tasks import Example, read_rows
from stages.common import BASE, CALIBRATION, compressed, run
from stages.config import Params


def main(params: Params, recipe: str) -> None:
    """One compressed base, which serves every task."""
    steps = params.compressions[recipe]
    check_recipe(steps)
    tokenizer = load_tokenizer(BASE)
    rows = read_rows(CALIBRATION, "run `dvc repro calibration`")
    calibration = [Example(tokenizer(row["text"]).input_ids) for row in rows]
    model = load_model(BASE, torch.bfloat16)
    report = compress(model, steps, calibration)
    save(model, report, compressed(recipe), BASE)
    before, after = bytes_on_disk(BASE), bytes_on_disk(compressed(recipe))
    print(f"{recipe}: {before / 1e6:.1f} MB -> {after / 1e6:.1f} MB ({after / before:.3f})")


if __name__ == "__main__":
    run(main)
