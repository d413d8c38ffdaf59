"""Batches of like length: almost no padding, and the batch of any step is known without running the others."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from calora.errors import CaloraError


def length_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches of like length, longest first (a run out of memory then fails at once)."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def equal_length_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches of exactly one length each, so that no position is padding."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batches and len(batches[-1]) < batch_size and lengths[batches[-1][0]] == lengths[index]:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def epoch_batches(lengths: Sequence[int], batch_size: int, steps: int, seed: int) -> list[list[int]]:
    """The batch of each step: every epoch uses each index once, shuffled, then bucketed by length.

    Lengths are sorted within pools of 50 batches of a seeded random order, and the batches are shuffled again, so
    that batches stay random while a row is padded by a token or two. Each epoch's last batch may be smaller.

    Raises:
        CaloraError: there is nothing to make batches of.
    """
    if not lengths:
        raise CaloraError("training", "at least one text", "none", "give it labelled texts")
    generator = torch.Generator().manual_seed(seed)
    batches: list[list[int]] = []
    while len(batches) < steps:
        order = torch.randperm(len(lengths), generator=generator).tolist()
        epoch: list[list[int]] = []
        for start in range(0, len(order), 50 * batch_size):
            pool = order[start : start + 50 * batch_size]
            by_length = length_batches([lengths[i] for i in pool], batch_size)
            epoch += [[pool[i] for i in batch] for batch in by_length]
        batches += [epoch[i] for i in torch.randperm(len(epoch), generator=generator).tolist()]
    return batches[:steps]
