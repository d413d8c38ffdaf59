"""How far the next-token distribution of a model is from its teacher's."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

ROWS = 32  # positions at a time: over a whole vocabulary so many fit a processor's cache, and all of a batch do not


def divergence(logits: Tensor, target: Tensor) -> Tensor:
    """KL(teacher || student) over the same k tokens, [P, k] each, mean over positions.

    Some positions at a time, and once more for the gradient: nothing else of the size of all logits is made.
    """
    parts = zip(logits.split(ROWS), target.split(ROWS), strict=True)
    sums = [checkpoint(_summed, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    return torch.stack(sums).sum() / len(logits)


def _summed(logits: Tensor, target: Tensor) -> Tensor:
    student, teacher = logits.float().log_softmax(-1), target.float().log_softmax(-1)
    return F.kl_div(student, teacher, log_target=True, reduction="sum")
