"""How fast a core of this machine multiplies: a measurement of a second, in time of the core, whatever else it is doing."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import torch

from calora.models.loading import compute_dtype

TOKENS = 512  # rows of the product: about a batch
SECONDS = 0.15  # of measuring, each


@dataclass(frozen=True)
class Speed:
    """10^9 multiplications and additions a second of one core.

    Args:
        compute: in the dtype that models compute in here.
        fp32: in fp32, in which second moments are worked with.
        dtype: the former's name.
        cores: that this process may use.
    """

    compute: float
    fp32: float
    dtype: str
    cores: int


def speed(width: int, inner: int) -> Speed:
    """Measure products [512, width] x [width, inner]."""
    dtype = compute_dtype()
    found = {one: _rate(width, inner, one) for one in dict.fromkeys((dtype, torch.float32))}
    return Speed(found[dtype], found[torch.float32], str(dtype).removeprefix("torch."), len(os.sched_getaffinity(0)))


def _rate(width: int, inner: int, dtype: torch.dtype) -> float:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, width, generator=generator).to(dtype)
    weight = torch.randn(inner, width, generator=generator).to(dtype)
    x @ weight.T  # threads and kernels are there from here on
    count, began = 0, time.process_time()
    while time.process_time() - began < SECONDS:
        x @ weight.T
        count += 1
    return 2 * TOKENS * width * inner * count / (time.process_time() - began) / 1e9
