"""Optimal brain surgeon over columns: cut or round one input after another, and let those that follow absorb the error.

With H = X^T X and U the upper Cholesky factor of H^-1, changing column j of W by e costs ||e / U_jj||^2 and is best
answered by W[:, k] -= e / U_jj U_jk for k > j. That is GPTQ (arXiv 2210.17323, algorithm 1) where columns are rounded,
and SparseGPT (arXiv 2301.00774, algorithm 1) where the weights with the lowest w^2 / U_jj^2 are cut.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from calora.codes import Grid

DAMPING = 0.01  # of the mean of the diagonal, added to it, as both papers do
COLUMNS = 128  # updated lazily: the columns after a span are touched once a span

Choose = Callable[[Tensor], Tensor]  # scores [out, n] -> which to keep, bool [out, n]


def inverse_factor(moment: Tensor) -> Tensor:
    """U [in, in], fp32, with U^T U = (H + damping)^-1."""
    damped = moment.double()
    diagonal = damped.diagonal()
    diagonal += DAMPING * diagonal.mean().clamp_min(1e-12)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True).float()
    return factor


def cut(weight: Tensor, moment: Tensor, choose: Choose, span: int) -> tuple[Tensor, Tensor]:
    """SparseGPT: (values [out, in], keep [out, in]); `choose` sees the scores of `span` columns at a time."""
    factor = inverse_factor(moment)
    keep = torch.zeros(weight.shape, dtype=torch.bool)

    def decide(column: Tensor, index: int, ahead: Tensor) -> Tensor:
        if index % span == 0:
            scale = factor.diagonal()[index : index + span]
            keep[:, index : index + span] = choose((ahead[:, :span] / scale).square())
        return column * keep[:, index]

    return _sweep(weight, factor, decide, -(-COLUMNS // span) * span), keep


def round_to(
    weight: Tensor, moment: Tensor, fit: Callable[[Tensor], Grid], group: int, keep: Tensor | None = None
) -> tuple[Tensor, Grid]:
    """GPTQ: (values [out, in] on a grid, the grid); where `keep` is False they stay 0.

    Groups of inputs go in the order of their falling mean H_jj, and so do the inputs of each (GPTQModel's `act_group_aware`).
    A group's grid is fitted when its turn comes, to what the errors of the earlier ones have made of its weights: on
    grids that were fitted before, symmetric int4 loses half as much again (docs/compression.md).

    Args:
        fit: weights [out, group] -> their grid.
        group: inputs that share a scale: at most 128 (it divides that), or the whole row.
    """
    diagonal = moment.diagonal().view(-1, group)
    places = diagonal.mean(1).argsort(descending=True)
    order = (places.unsqueeze(1) * group + diagonal[places].argsort(1, descending=True)).flatten()
    kept = torch.ones_like(weight, dtype=torch.bool) if keep is None else keep[:, order]
    start, grids = weight[:, order], dict[int, Grid]()

    def decide(column: Tensor, index: int, ahead: Tensor) -> Tensor:
        place = int(places[index // group])
        if index % group == 0:
            now = ahead[:, :group] if group <= COLUMNS else start  # a group that is the row: nothing has changed yet
            grids[place] = fit(now * kept[:, index : index + group])
        return grids[place].column(column) * kept[:, index]

    values = _sweep(start, inverse_factor(moment[order][:, order]), decide, COLUMNS)
    return values[:, order.argsort()], Grid.of_groups([grids[place] for place in range(len(places))])


def _sweep(weight: Tensor, factor: Tensor, decide: Callable[[Tensor, int, Tensor], Tensor], span: int) -> Tensor:
    left = weight.detach().float().clone()
    for start in range(0, left.shape[1], span):
        stop = min(start + span, left.shape[1])
        piece = left[:, start:stop]  # a view: holds the new values once the span is done
        local = factor[start:stop, start:stop]
        errors = torch.zeros_like(piece)
        for i in range(stop - start):
            column = piece[:, i].clone()
            new = decide(column, start + i, piece[:, i:])
            errors[:, i] = (column - new) / local[i, i]
            piece[:, i:].addr_(errors[:, i], local[i, i:], alpha=-1)
            piece[:, i] = new
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    return left
