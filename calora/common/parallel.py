"""One training on several devices: each process takes its share of every batch, and all take the mean of the gradients.

`accelerate launch` starts the processes. A process alone changes nothing here but the device: a GPU where there is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor, nn

T = TypeVar("T")


def state() -> PartialState:
    """Accelerate's view of this process; unless told so it would let each of several on CPUs train alone."""
    return PartialState(cpu=not torch.accelerator.is_available())


def place(model: nn.Module) -> None:
    """Put a model on the device of this process."""
    model.to(state().device)


def processes() -> int:
    """How many train together."""
    return int(state().num_processes)


def share(indices: Sequence[int]) -> list[int]:
    """What this process takes of a batch.

    Shares are of one size, so that the mean of their means is the mean; a batch that the processes do not divide is
    filled up from its start, as accelerate does it.
    """
    count = processes()
    whole = len(indices) + -len(indices) % count
    return [indices[i % len(indices)] for i in range(state().process_index, whole, count)]


def portion(items: Sequence[T]) -> list[T]:
    """What this process takes of a sequence in which each item counts once."""
    return list(items[state().process_index :: processes()])


def average(tensor: Tensor) -> Tensor:
    """Put the mean over all processes in the place of a tensor, and return it."""
    return tensor if processes() == 1 else tensor.copy_(reduce(tensor, "mean"))


def total(value: float) -> float:
    """The sum over all processes of a number that each of them has."""
    return value if processes() == 1 else float(reduce(torch.tensor(float(value), device=state().device), "sum"))


def first() -> bool:
    """Whether this process is the one that writes."""
    return bool(state().is_main_process)


def only_first_goes_on() -> None:
    """End every process but the first: what they trained is the same in all."""
    state().wait_for_everyone()
    if not first():
        raise SystemExit(0)
