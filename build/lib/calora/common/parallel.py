"""One training on several devices: each process takes its share of every batch, and all take the mean of the gradients.

A loss is a mean over answer tokens or real tokens, of which shares have different numbers: each is weighted (`weight`),
and the mean of the gradients is that of the whole batch.

`accelerate launch` starts the processes. A process alone changes nothing here but the device (`calora.common.devices`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from torch import Tensor, nn

from calora.common.devices import accelerated

T = TypeVar("T")


def state() -> PartialState:
    """Accelerate's view of this process; unless told so it would let each of several on CPUs train alone."""
    return PartialState(cpu=not accelerated())


def place(model: nn.Module) -> None:
    """Put a model on the device of this process."""
    model.to(device())


def device() -> torch.device:
    """The device of this process."""
    found: torch.device = state().device
    return found


def processes() -> int:
    """How many train together."""
    return int(state().num_processes)


def share(indices: Sequence[int]) -> list[int]:
    """What this process takes of a batch, never nothing: of a batch smaller than the processes some repeat its first.

    Shares may differ in size, and their items in number of tokens: `weight` sets that right.
    """
    return portion(indices) or list(indices[:1])


def weight(counted: Tensor, indices: Sequence[int]) -> float:
    """Weight of a mean over this process's share, so that the mean over processes is the mean over the whole batch.

    n_i P / sum_j n_j for P processes, where process i has the mean over n_i items; 0 for one that repeats another's.

    Args:
        counted: bool of any shape, True at each item of the mean.
        indices: the whole batch, of which `share` gave this process its part.
    """
    if processes() == 1:
        return 1.0
    own = float(counted.sum()) if state().process_index < len(indices) else 0.0
    return own * processes() / total(own)


def portion(items: Sequence[T]) -> list[T]:
    """What this process takes of a sequence in which each item counts once."""
    return list(items[state().process_index :: processes()])


def average(tensor: Tensor) -> Tensor:
    """Put the mean over all processes in the place of a tensor, and return it."""
    return tensor if processes() == 1 else tensor.copy_(reduce(tensor, "mean"))


def total(value: float) -> float:
    """The sum over all processes of a number that each of them has."""
    return value if processes() == 1 else float(reduce(torch.tensor(float(value), device=state().device), "sum"))


def gathered(values: Sequence[T]) -> list[T]:
    """The values of all processes, those of the first one first."""
    return list(values) if processes() == 1 else list(gather_object(list(values)))


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return bool(state().is_main_process)


def only_first_goes_on() -> None:
    """End every process but the first: what they trained is the same in all."""
    state().wait_for_everyone()
    if not is_first():
        raise SystemExit(0)
