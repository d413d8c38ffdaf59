"""One step of training in parts: gradients are summed over parts of a batch, so that the activations of one are in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from calora.common.parallel import share, weight
from calora.distillation.loss import items
from calora.models.anatomy import stacks
from calora.models.families import Batch, family_of
from calora.models.tasks import Example


class Parts:
    """What this process takes of a batch, in parts of as many texts each, or one more.

    Args:
        texts: of a pool.
        indices: the whole batch, of the pool's texts.
        count: of parts; fewer where there are fewer texts.
    """

    def __init__(self, model: PreTrainedModel, texts: Sequence[Example], indices: Sequence[int], count: int) -> None:
        own, family = share(indices), family_of(model)
        count = min(count, len(own))
        ends = [len(own) * part // count for part in range(count + 1)]
        self.whole, self.indices = indices, [own[start:end] for start, end in pairwise(ends)]
        self.batches = [family.collate([texts[i] for i in part], model) for part in self.indices]
        self.tokens = [sum(texts[i].tokens for i in part) for part in self.indices]
        self._known: dict[str, tuple[float, float]] = {}

    def weight(self, batch: Batch, kind: str) -> float:
        """Weight of a mean over the items of one part, so that the sum over parts is the mean over the whole batch.

        n_i / sum_j n_j over the parts, times that of the process (`parallel.weight`).
        """
        if kind not in self._known:  # once, also because all processes count together
            every = torch.cat([items(part, kind).flatten() for part in self.batches])
            self._known[kind] = weight(every, self.whole), float(every.sum())
        factor, count = self._known[kind]
        return factor * float(items(batch, kind).sum()) / count if len(self.batches) > 1 else factor


@contextmanager
def recomputing(model: nn.Module, on: bool = True) -> Iterator[None]:
    """Keep the inputs of each block alone, and compute the rest again in the backward pass (arXiv 1604.06174).

    Not transformers' own switch, which works in training mode alone: there dropout is on.
    """
    blocks: list[Any] = [block for stack in stacks(model).values() for block in stack] if on else []
    for block in blocks:
        block.forward = _Recomputed(block.forward)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # the class's own is behind it


class _Recomputed:
    """The forward pass of a block."""

    def __init__(self, forward: Any) -> None:
        self.forward = forward

    def __call__(self, *args: Any, **options: Any) -> Any:
        """The same; its inner values are not kept for the backward pass."""
        if not torch.is_grad_enabled():
            return self.forward(*args, **options)
        return checkpoint(self.forward, *args, use_reentrant=False, preserve_rng_state=False, **options)
