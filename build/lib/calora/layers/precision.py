"""Compute in one dtype what is stored in another: a CPU without bf16 kernels is very slow in bf16."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from calora.errors import CaloraError
from calora.layers.experts import ExpertLinear
from calora.layers.nf4 import Nf4Linear
from calora.layers.packed import PackedEmbedding, PackedLinear

PACKED = (PackedLinear, PackedEmbedding, Nf4Linear, ExpertLinear)


@contextmanager
def computing_in(model: nn.Module, dtype: torch.dtype, stored: torch.dtype) -> Iterator[None]:
    """Let a model whose dense tensors are in `stored` compute in `dtype`, then bring them back, new ones too.

    What is packed stays as it is: packed layers compute in the dtype of their inputs.

    Raises:
        CaloraError: `dtype` does not hold every value of `stored`, so that untouched weights would change.
    """
    if torch.promote_types(dtype, stored) != dtype:
        raise CaloraError("compute", f"a dtype that holds every value of {stored}", dtype, "use torch.float32")
    names = {name for name, tensor in dense_tensors(model) if tensor.dtype == stored}
    _cast(model, names, stored, dtype)
    try:
        yield
    finally:
        _cast(model, names, dtype, stored)


def compute_in(model: nn.Module, dtype: torch.dtype, stored: torch.dtype) -> None:
    """Let a model compute in `dtype` from now on: its dense tensors of dtype `stored` are brought there."""
    _cast(model, {name for name, _ in dense_tensors(model)}, stored, dtype)


def dense_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors of layers that are not packed, by name."""
    for path, module in model.named_modules():
        if not isinstance(module, PACKED):
            for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                yield f"{path}.{name}".removeprefix("."), tensor


def _cast(model: nn.Module, names: set[str], old: torch.dtype, new: torch.dtype) -> None:
    if old != new:
        for name, tensor in dense_tensors(model):
            if name in names and tensor.dtype == old:
                tensor.data = tensor.data.to(new)
