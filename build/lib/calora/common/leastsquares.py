"""What inputs that are no longer there gave, told from those that are."""

from __future__ import annotations

import torch
from torch import Tensor

DAMPING = 0.01  # of the mean of the diagonal


def compensated(weight: Tensor, moment: Tensor, kept: Tensor) -> Tensor:
    """W' = W[:, S] + W[:, R] C[R, S] C[S, S]^-1, the least squares fit of W X from the kept inputs S; R are the others.

    Args:
        weight: W [out, in].
        moment: C = X^T X [in, in].
        kept: S, indices of inputs, in the order of the result.

    Returns:
        [out, len(S)], in the dtype of `weight`; exactly W[:, S] where W[:, R] is 0 or R is empty.
    """
    whole = torch.arange(len(moment), device=moment.device)
    cut = whole[~torch.isin(whole, kept)]
    if not len(cut):
        return weight[:, kept].clone()
    own = moment[kept][:, kept].double()
    own.diagonal().add_(DAMPING * own.diagonal().mean().clamp_min(1e-12))
    told: Tensor = torch.linalg.solve(own, moment[kept][:, cut].double()).T.float()  # [R, S]
    return (weight[:, kept].float() + weight[:, cut].float() @ told).to(weight.dtype)
