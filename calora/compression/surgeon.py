"""Optimal brain surgeon over columns: cut or round one input after another, and let those that follow absorb the error.

With H = X^T X and U the upper Cholesky factor of H^-1, changing column j of W by e costs ||e / U_jj||^2 and is best
answered by W[:, k] -= e / U_jj U_jk for k > j. That is GPTQ (arXiv 2210.17323, algorithm 1) where columns are rounded,
and SparseGPT (arXiv 2301.00774, algorithm 1) where the weights with the lowest w^2 / U_jj^2 are cut.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

DAMPING = 0.05  # of the mean of the diagonal, added to it; the papers' 0.01 fits the calibration texts too closely
COLUMNS = 128  # the most that are decided on together
LAZY = 32  # the columns after a span are touched once a span, by one product


_factors = WeakTensorKeyDictionary()  # moment -> its factor, for as long as the moment lives


def inverse_factor(moment: Tensor) -> Tensor:
    """U [in, in], fp32, with U^T U = (H + damping)^-1; made once for each tensor."""
    if moment not in _factors:
        _factors[moment] = _inverse_factor(moment)
    known: Tensor = _factors[moment]
    return known


def _inverse_factor(moment: Tensor) -> Tensor:
    damped = moment.double().clone()
    diagonal = damped.diagonal()
    diagonal += DAMPING * diagonal.mean().clamp_min(1e-12)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True).float()
    return factor


def sweep(weight: Tensor, factor: Tensor, decide: Callable[[Tensor, int, Tensor], Tensor], span: int) -> Tensor:
    """The new weights [out, in]: `decide` gives each column in turn, and those that follow absorb its error.

    Args:
        factor: U of `inverse_factor`.
        decide: (column [out], its index, it and what follows of its span [out, rest]) -> the new column [out].
        span: columns between two updates of all that follow.
    """
    left = weight.detach().float().clone()  # [out, in]
    for start in range(0, left.shape[1], span):
        stop = min(start + span, left.shape[1])
        piece = left[:, start:stop]  # [out, span], a view: holds the new values once the span is done
        local = factor[start:stop, start:stop]  # [span, span]
        errors = torch.zeros_like(piece)  # [out, span]
        for i in range(stop - start):
            column = piece[:, i].clone()  # [out]
            new = decide(column, start + i, piece[:, i:])
            errors[:, i] = (column - new) / local[i, i]
            piece[:, i:].addr_(errors[:, i], local[i, i:], alpha=-1)
            piece[:, i] = new
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    return left
