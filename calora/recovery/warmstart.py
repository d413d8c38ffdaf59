"""The exact linear warm start of the bypass, from the activation-weighted compression error.

With E = W - W_c [out, in] and C = X^T X [in, in] over calibration inputs, the rank-k map that loses least,
min ||(E - T) X^T||_F, is the projection of E onto the k leading eigenvectors of E C E^T (Eckart-Young in the
norm of C; QERA, arXiv 2410.06040, and EoRA, arXiv 2410.21271, give the same optimum by way of C^-1/2, which
this form does not need). For GELU, SiLU and ReLU, sigma(z) - sigma(-z) = z, so a bypass of rank 2k with
D = [P, -P] and U = [Q; -Q] is exactly the linear map P Q, and stays trainable as a non-linear one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calora.errors import CaloraError


def best_linear_correction(error: Tensor, moment: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """P [in, k], Q [k, out] with x P Q ~ x E^T, optimal for inputs whose second moment is `moment`.

    Args:
        error: E = W - W_c [out, in].
        moment: X^T X [in, in], symmetric, positive semi-definite.
        rank: k >= 1.

    P and Q share the size of the correction equally (equal Frobenius norms), so that both learn at one rate.
    """
    error, moment = error.double(), moment.double()
    if error.shape[0] <= error.shape[1]:
        basis = torch.linalg.eigh(error @ moment @ error.T).eigenvectors[:, -rank:]  # [out, k]
    else:  # the smaller Gram matrix: with C = S S^T, left vectors of E S from right ones
        values, vectors = torch.linalg.eigh(moment)  # not Cholesky: few calibration tokens make C singular
        weighted = error @ (vectors * values.clamp_min(0).sqrt())
        right = torch.linalg.eigh(weighted.T @ weighted).eigenvectors[:, -rank:]
        basis = torch.linalg.qr(weighted @ right).Q  # [out, k]
    p, q = error.T @ basis, basis.T
    balance = (q.norm() / p.norm().clamp_min(1e-30)).sqrt()
    return (p * balance).float(), (q / balance).float()


def linear_as_bypass(p: Tensor, q: Tensor, activation: str, rank: int) -> tuple[Tensor, Tensor]:
    """D [in, rank], U [rank, out] of a bypass that equals the linear map P Q exactly; k <= rank / 2 unless linear."""
    if activation == "identity":
        down, up = p, q
    else:
        down, up = torch.cat([p, -p], dim=1), torch.cat([q, -q])
    if down.shape[1] != rank:
        raise CaloraError(
            "warm start", f"a correction that fills rank {rank}", down.shape[1], "set an even inherit.rank"
        )
    return down, up


def correction_rank(rank: int, activation: str) -> int:
    """Rank k of the linear correction that a bypass of this rank and activation can hold."""
    if activation == "identity":
        return rank
    if rank % 2:
        raise CaloraError("inherit.rank", f"an even rank for the warm start with {activation}", rank, "set it even")
    return rank // 2
