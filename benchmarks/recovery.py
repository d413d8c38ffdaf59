"""Ways to fit a low-rank map beside a compressed weight, by the squared error of a layer's output on held-back texts.

`python -m benchmarks.recovery`, after `make run`. Layers q, gate and down of blocks 3 and 20 of the base; inputs of 64
calibration texts, errors on 32 others; the geometric mean over the layers, plain compression = 1.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.references import BASE, calibration
from calora.compression.gptq import gptq
from calora.compression.prune import keep_n_of_m
from calora.compression.sparsegpt import sparsegpt
from calora.layers.codes import fit_grid
from calora.models.anatomy import linear_layers
from calora.models.loading import load_model
from calora.models.moments import input_second_moments
from calora.models.tasks import Example
from calora.recovery.warmstart import best_linear_correction

LAYERS = tuple(
    f"model.layers.{block}.{layer}"
    for block in (3, 20)
    for layer in ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj")
)
Compressor = Callable[[Tensor, Tensor], Tensor]  # (W [out, in], X^T X [in, in]) -> W_c [out, in]
Round = tuple[Tensor, Tensor]  # W_c and L, both [out, in]


def two_of_four(weight: Tensor, moment: Tensor) -> Tensor:
    """2:4 by SparseGPT."""
    return sparsegpt(weight, moment, lambda score: keep_n_of_m(score, 2, 4), 4)[0]


def rounded(weight: Tensor, moment: Tensor, bits: int) -> Tensor:
    """So many bits, group 64, asymmetric, searched range, by GPTQ."""
    fit = partial(fit_grid, bits=bits, group=64, symmetric=False, dtype=torch.bfloat16, search=True)
    return gptq(weight, moment, fit, 64)[0]


def best(error: Tensor, moment: Tensor, rank: int) -> Tensor:
    """The map [out, in] of a rank that answers an error best."""
    p, q = best_linear_correction(error, moment, rank)
    return (p @ q).T


def rounds(
    weight: Tensor, moment: Tensor, rank: int, compressor: Compressor, turns: int, kept: int = 0
) -> Iterator[Round]:
    """W_c = c(W - L), L = best(W - W_c), from L = 0 or from the map of rank `kept` that keeps most of W."""
    low = best(weight, moment, kept) if kept else torch.zeros_like(weight)
    for _ in range(turns):
        made = compressor(weight - low, moment)
        low = best(weight - made, moment, rank)
        yield made, low


def projq(weight: Tensor, moment: Tensor, rank: int, compressor: Compressor, turns: int) -> Iterator[Round]:
    """ProjQ (arXiv 2606.00494): compress in the norm H' = C - C E^T Q (Q^T E C E^T Q)^-1 Q^T E C of what no map can mend."""
    made = compressor(weight, moment)
    for _ in range(turns):
        error = (weight - made).double()
        wide = moment.double()
        basis = torch.linalg.eigh(error @ wide @ error.T).eigenvectors[:, -rank:]  # [out, k]
        seen = basis.T @ error @ wide  # [k, in]
        inner = seen @ error.T @ basis  # [k, k]
        left = wide - seen.T @ torch.linalg.solve(inner, seen)
        made = compressor(weight, left.float())
        yield made, best(weight - made, moment, rank)


def intrinsic(weight: Tensor, moment: Tensor, rank: int, compressor: Compressor) -> Iterator[Round]:
    """GPTQ-intrinsic LoRA (arXiv 2606.01412): compress without the norm of the leading inputs, which a map can always mend."""
    values, vectors = torch.linalg.eigh(moment.double())
    values[-rank:] = 0
    made = compressor(weight, (vectors * values @ vectors.T).float())
    yield made, best(weight - made, moment, rank)


def ways(rank: int) -> dict[str, Callable[[Tensor, Tensor, Compressor], Iterator[Round]]]:
    """Name -> rounds."""
    return {
        "after": lambda w, c, f: rounds(w, c, rank, f, 1),
        "alternate, 3 rounds": lambda w, c, f: rounds(w, c, rank, f, 3),
        "alternate, 8 rounds": lambda w, c, f: rounds(w, c, rank, f, 8),
        "SRR (half of the rank preserved, 1 round)": lambda w, c, f: rounds(w, c, rank, f, 1, rank // 2),
        "half preserved, 3 rounds": lambda w, c, f: rounds(w, c, rank, f, 3, rank // 2),
        "preserve, 1 round": lambda w, c, f: rounds(w, c, rank, f, 1, rank),
        "preserve, 3 rounds": lambda w, c, f: rounds(w, c, rank, f, 3, rank),
        "preserve, 8 rounds": lambda w, c, f: rounds(w, c, rank, f, 8, rank),
        "ProjQ, 3 rounds": lambda w, c, f: projq(w, c, rank, f, 3),
        "GPTQ-intrinsic": lambda w, c, f: intrinsic(w, c, rank, f),
    }


def layers_of(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The layers that are looked at."""
    known = linear_layers(model)
    return {name: known[name] for name in LAYERS}


def lost(error: Tensor, moment: Tensor) -> float:
    """||E X||_F^2."""
    return float(((error @ moment) * error).sum())


def main() -> None:
    """A line for each way: the round that is best on the calibration texts, on the others."""
    texts = [Example(ids) for ids in calibration()]
    model = load_model(Path(BASE), torch.float32)
    layers = layers_of(model)
    seen, held = (dict(input_second_moments(model, part, layers)) for part in (texts[:64], texts[64:96]))
    for title, compressor in (("2:4", two_of_four), ("int2 g64", partial(rounded, bits=2))):
        plain = {
            name: lost(layer.weight - compressor(layer.weight, seen[name]), held[name])
            for name, layer in layers.items()
        }
        for rank in map(int, sys.argv[1:] or (16, 32)):
            for way, go in ways(rank).items():
                ratios = []
                for name, layer in layers.items():
                    weight = layer.weight.detach()
                    chosen = min(
                        (weight - made - low for made, low in go(weight, seen[name], compressor)),
                        key=lambda e: lost(e, seen[name]),
                    )
                    ratios.append(lost(chosen, held[name]) / plain[name])
                mean = float(torch.tensor(ratios).log().mean().exp())
                print(
                    f"{title} | rank {rank} | {way} | {mean:.3f} | {' '.join(f'{r:.2f}' for r in ratios)}", flush=True
                )


if __name__ == "__main__":
    with torch.no_grad():
        main()
