"""Where the blocks of a model are: all of them in memory, unless it says otherwise (`calora.compression.streamed`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel


class Blocks:
    """The blocks of a model, all of them in memory."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    @contextmanager
    def present(self, name: str) -> Iterator[None]:
        """The block called `name` is in memory meanwhile."""
        yield

    @contextmanager
    def passing(self) -> Iterator[None]:
        """The model can be run meanwhile, without gradients."""
        yield

    def finish(self, name: str, path: Path | None) -> None:
        """The block called `name` is as it will be, and `path` holds what is new in it."""

    def states(self) -> Iterator[dict[str, Tensor]]:
        """The model's tensors by name, in pieces that are in memory one at a time."""
        yield self.model.state_dict()


def blocks_of(model: PreTrainedModel) -> Blocks:
    """Where the blocks of a model are."""
    found: Blocks | None = getattr(model, "calora_blocks", None)
    return found or Blocks(model)
