"""How far the next-token distribution of a model is from its teacher's."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def divergence(logits: Tensor, target: Tensor) -> Tensor:
    """KL(teacher || student) over the same k tokens, [P, k] each, mean over positions."""
    return F.kl_div(
        logits.float().log_softmax(-1), target.float().log_softmax(-1), log_target=True, reduction="batchmean"
    )
