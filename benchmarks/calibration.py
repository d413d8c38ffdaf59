"""How many calibration texts, and how much damping: squared errors of layers' outputs on texts that nothing was fitted to.

`python -m benchmarks.calibration`, after `make run`. Layers q, gate and down of blocks 3 and 20 of the base, alone; inputs of
so many tuning texts, errors on the calibration texts, each relative to ||W X||^2.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.recovery import LAYERS, Compressor, layers_of, lost, rounded, two_of_four
from benchmarks.references import BASE, CALIBRATION, TUNING, tokens
from calora.compression import surgeon
from calora.models.loading import compute_dtype, load_model
from calora.models.moments import input_second_moments
from calora.models.tasks import Example

TEXTS = (128, 384, 1536)
DAMPINGS = (0.01, 0.03, 0.1, 0.3)


def error(weight: Tensor, seen: Tensor, held: Tensor, compressor: Compressor, damping: float) -> float:
    """||(W - W_c) X||^2 / ||W X||^2 on held-back inputs."""
    surgeon.DAMPING = damping
    return lost(weight - compressor(weight, seen.clone()), held) / lost(weight, held)  # factors are kept by tensor


def moments_of(model: PreTrainedModel, texts: Sequence[Example]) -> dict[int, dict[str, Tensor]]:
    """Texts -> layer -> X^T X of the first so many."""
    layers = layers_of(model)
    found: dict[int, dict[str, Tensor]] = {}
    start, sums = 0, {name: torch.zeros(()) for name in LAYERS}
    for count in TEXTS:
        part = dict(input_second_moments(model, texts[start:count], layers))
        sums = {name: sums[name] + part[name] for name in LAYERS}
        start, found[count] = count, sums
    return found


def main() -> None:
    """A line for each compression, layer and number of texts: the errors by damping."""
    held_back, texts = ([Example(ids) for ids in tokens(path)] for path in (CALIBRATION, TUNING))
    random.Random(0).shuffle(texts)  # they come corpus by corpus
    model = load_model(Path(BASE), compute_dtype())
    layers = layers_of(model)
    seen, held = moments_of(model, texts), dict(input_second_moments(model, held_back[:128], layers))
    print("compression | layer | texts |", " | ".join(f"damping {damping}" for damping in DAMPINGS))
    for title, compressor in (("2:4", two_of_four), ("int3 g64", partial(rounded, bits=3))):
        for name, weight in ((name, layer.weight.detach().float()) for name, layer in layers.items()):
            for count in TEXTS:
                errors = [error(weight, seen[count][name], held[name], compressor, damping) for damping in DAMPINGS]
                print(f"{title} | {name} | {count} |", " | ".join(f"{value:.4f}" for value in errors), flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        main()
