"""One walk through the model against a walk a step: held-back perplexity, and seconds, of recipes of several steps.

`python -m benchmarks.walks [recipe ...]`, after `make run` and `python -m stages.download nyt` (as benchmarks.references).
It computes in the dtype that this processor is fast in; CALORA_DTYPE is another choice. Values are stored in bf16 all the same.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.references import BASE, CALIBRATION, TUNING, perplexity, tokens
from calora.compression import Recipe, compress
from calora.compression.walk import Calibration
from calora.layers.layout import dense_view
from calora.layers.packed import PackedEmbedding
from calora.models.anatomy import linear_layers
from calora.models.loading import compute_dtype, load_model
from calora.models.tasks import Example
from stages.config import load_params

RECIPES = ("q8_up", "q4_up", "q8_up_m")


def compressed(parts: Sequence[Recipe], calibration: Calibration) -> Any:
    """The base after one recipe and then the next, each in a walk of its own; every layer dense, with the stored values."""
    model = load_model(Path(BASE), torch.bfloat16)
    for part in parts:
        compress(model, part, calibration, compute_dtype())
    return dense(model).to(compute_dtype())


def dense(model: Any) -> Any:
    """The same model with every packed layer unpacked: the values count, not the kernels."""
    tables = {name: module for name, module in model.named_modules() if isinstance(module, PackedEmbedding)}
    layers: dict[str, nn.Module] = {**linear_layers(model), **tables}
    for name, layer in layers.items():
        model.set_submodule(name, dense_view(layer, torch.bfloat16))
    return model


def main() -> None:
    """Two lines a recipe."""
    texts, tuning = ([Example(ids) for ids in tokens(path)] for path in (CALIBRATION, TUNING))
    looked_at, recipes = Calibration(texts, tuning=tuning), load_params().compressions
    for name in sys.argv[1:] or RECIPES:
        recipe = recipes[name]
        for title, parts in (("one walk", [recipe]), ("a walk a step", [[step] for step in recipe])):
            start = time.monotonic()
            model = compressed(parts, looked_at)
            seconds = time.monotonic() - start
            print(f"{name} | {title} | {perplexity(model):.2f} | {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
