"""The exact linear warm start of the bypass, from the activation-weighted compression error.

With E = W - W_c [out, in] and C = X^T X [in, in] over calibration inputs, the rank-k map that loses least,
min ||(E - T) X^T||_F, is the projection of E onto the k leading eigenvectors of E C E^T (Eckart-Young in the
norm of C; QERA, arXiv 2410.06040, and EoRA, arXiv 2410.21271, give the same optimum by way of C^-1/2, which
this form does not need). For GELU, SiLU and ReLU, sigma(z) - sigma(-z) = z, so a bypass of rank 2k with
D = [P, -P] and U = [Q; -Q] is exactly the linear map P Q, and stays trainable as a non-linear one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from calora.errors import CaloraError
from calora.recovery.bypass import ACTIVATIONS


def best_linear_correction(error: Tensor, moment: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """P [in, k], Q [k, out] with x P Q ~ x E^T, optimal for inputs whose second moment is `moment`.

    Args:
        error: E = W - W_c [out, in].
        moment: X^T X [in, in], symmetric, positive semi-definite.
        rank: k >= 1.

    P and Q share the size of the correction equally (equal Frobenius norms), so that both learn at one rate.
    """
    error = error.double()
    if error.shape[0] <= error.shape[1]:
        basis = torch.linalg.eigh(error @ moment.double() @ error.T).eigenvectors[:, -rank:]  # [out, k]
    else:
        weighted = _weighted(error, moment)
        right = torch.linalg.eigh(weighted.T @ weighted).eigenvectors[:, -rank:]
        basis = torch.linalg.qr(weighted @ right).Q  # [out, k]
    p, q = error.T @ basis, basis.T
    balance = (q.norm() / p.norm().clamp_min(1e-30)).sqrt()
    return (p * balance).float(), (q / balance).float()


def _weighted(error: Tensor, moment: Tensor) -> Tensor:
    """E S [out, in] with C = S S^T: its smaller Gram matrix is [in, in], where E C E^T is [out, out]."""
    weighted: Tensor = error.double() @ _root(moment)
    return weighted


_roots = WeakTensorKeyDictionary()  # moment -> its root, for as long as the moment lives


def _root(moment: Tensor) -> Tensor:
    """S [in, in], fp64, with C = S S^T; made once for each tensor."""
    if moment not in _roots:
        values, vectors = torch.linalg.eigh(moment.double())  # not Cholesky: few calibration tokens make C singular
        _roots[moment] = vectors * values.clamp_min(0).sqrt()
    root: Tensor = _roots[moment]
    return root


def spectrum(error: Tensor, moment: Tensor) -> Tensor:
    """What each direction of the best map takes off ||E X^T||_F^2, fp64 [min(out, in)], falling.

    Args:
        error: E [out, in].
        moment: C = X^T X [in, in].
    """
    error = error.double()
    if error.shape[0] <= error.shape[1]:
        gram = error @ moment.double() @ error.T
    else:
        weighted = _weighted(error, moment)
        gram = weighted.T @ weighted
    values: Tensor = torch.linalg.eigvalsh(gram).flip(0)
    return values


def weighted_size(weight: Tensor, moment: Tensor) -> float:
    """||W X^T||_F, from X^T X [in, in]; at least 1e-30."""
    square = float(((weight @ moment) * weight).sum())
    return math.sqrt(max(square, 1e-60))


def linear_as_bypass(p: Tensor, q: Tensor, activation: str, rank: int) -> tuple[Tensor, Tensor]:
    """D [in, rank], U [rank, out] of a bypass that equals the linear map P Q exactly.

    Raises:
        CaloraError: P [in, k] and Q [k, out] do not fill the rank: k is not `correction_rank(rank, activation)`.
    """
    k = correction_rank(rank, activation)
    if p.shape[1] != k:
        raise CaloraError("warm start", f"a correction of rank {k}, which fills rank {rank}", p.shape[1], "cut it at k")
    return (p, q) if k == rank else (torch.cat([p, -p], dim=1), torch.cat([q, -q]))


def correction_rank(rank: int, activation: str) -> int:
    """Rank k of the linear correction that a bypass can hold: rank if it is linear, else rank / 2.

    Raises:
        CaloraError: no such bypass is linear: sigma(z) - sigma(-z) is not z, or the rank is odd.
    """
    sigma, z = ACTIVATIONS[activation], torch.linspace(-8, 8, 257, dtype=torch.float64)
    if torch.equal(sigma(z), z):
        return rank
    if not torch.allclose(sigma(z) - sigma(-z), z, rtol=0, atol=1e-12):
        expected = "an activation with sigma(z) - sigma(-z) = z for the warm start"
        raise CaloraError("activation", expected, activation, "start from zero, or take gelu, silu, relu or identity")
    if rank % 2:
        raise CaloraError("rank", f"an even rank for the warm start with {activation}", rank, "choose an even rank")
    return rank // 2
