"""SparseGPT (arXiv 2301.00774, algorithm 1): cut the weights with the lowest w^2 / U_jj^2, and let the others answer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from calora.compression.surgeon import LAZY, inverse_factor, sweep

Choose = Callable[[Tensor], Tensor]  # scores [out, n] -> which to keep, bool [out, n]


def sparsegpt(weight: Tensor, moment: Tensor, choose: Choose, span: int) -> tuple[Tensor, Tensor]:
    """SparseGPT: (values [out, in], keep [out, in]); `choose` sees the scores of `span` columns at a time."""
    factor = inverse_factor(moment)
    keep = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)

    def decide(column: Tensor, index: int, ahead: Tensor) -> Tensor:
        if index % span == 0:
            scale = factor.diagonal()[index : index + span]
            keep[:, index : index + span] = choose((ahead[:, :span] / scale).square())
        return column * keep[:, index]

    return sweep(weight, factor, decide, -(-LAZY // span) * span), keep
