"""One token at a time on a CPU: products with one row run on torch's own kernels instead of oneDNN's."""

from __future__ import annotations

from typing import Any

import torch


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
        onednn: Any = torch.backends.mkldnn
        before, onednn.enabled = onednn.enabled, False
        try:
            return parent.__call__(*args, **kwargs)
        finally:
            onednn.enabled = before
