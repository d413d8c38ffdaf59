"""One token at a time on a CPU: products with one row run on torch's own kernels instead of oneDNN's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch

_lock, _passes, _before = Lock(), 0, True  # how many passes want oneDNN off now, and what it was before the first


@contextmanager
def without_onednn() -> Iterator[None]:
    """Switch oneDNN off; torch has one switch for all threads, so the last of those that are inside sets it back."""
    global _passes, _before
    onednn: Any = torch.backends.mkldnn
    with _lock:
        if _passes == 0:
            _before, onednn.enabled = onednn.enabled, False
        _passes += 1
    try:
        yield
    finally:
        with _lock:
            _passes -= 1
            if _passes == 0:
                onednn.enabled = _before


class OneToken:
    """Comes before a transformers model among the bases of a class, and switches oneDNN off for single tokens.

    Setting up a product with one row takes oneDNN longer than reading the weights; torch's own kernels are about twice
    as fast there (bf16, AVX-512), and slower from a few rows on.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The forward pass."""
        parent: Any = super()
        ids = [kwargs[name] for name in ("input_ids", "decoder_input_ids") if kwargs.get(name) is not None]
        if not ids or any(tensor.numel() != 1 or tensor.device.type != "cpu" for tensor in ids):
            return parent.__call__(*args, **kwargs)
        with without_onednn():
            return parent.__call__(*args, **kwargs)
