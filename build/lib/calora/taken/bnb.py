"""bitsandbytes' layouts: nf4 and fp4 (`weight` with `weight.absmax` and more), and int8 (`weight` with `SCB`, 127 scales a row)."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from calora.errors import CaloraError
from calora.layers.nf4 import THEIRS
from calora.taken.values import Nf4, OnGrid, Values, grid_of

FP4 = THEIRS.replace("nf4", "fp4")
STATISTICS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", THEIRS, FP4)
PARTS = ("weight", "SCB", "weight_format", *(f"weight.{name}" for name in STATISTICS))
BLOCK = 64  # weights that share an absmax, in what our layer computes with


def check(settings: Mapping[str, Any], where: str) -> None:
    """Raise `CaloraError` where 4 bits are stored and bitsandbytes, which unpacks them, is not there."""
    if settings.get("load_in_4bit") and find_spec("bitsandbytes") is None:
        raise CaloraError(where, "bitsandbytes, to unpack its 4 bits", "no such package", "pip install bitsandbytes")


def read(parts: Mapping[str, Tensor], settings: Mapping[str, Any], shape: tuple[int, int]) -> Values:
    """The weight [out, in] of one layer; fp4 as plain values.

    int8: what was to stay in 16 bits (`llm_int8_threshold`) is columns of inputs, chosen as it runs: their weights are codes too.
    """
    if "SCB" in parts:
        return OnGrid(parts["weight"], grid_of(parts["SCB"].float().unsqueeze(1) / 127, None, 8))
    functional: Any = import_module("bitsandbytes").functional
    state = functional.QuantState.from_dict(
        {k.removeprefix("weight."): v for k, v in parts.items() if k != "weight"}, "cpu"
    )
    if state.quant_type == "nf4" and state.blocksize == BLOCK:
        return Nf4(parts, shape)
    plain: Tensor = functional.dequantize_4bit(parts["weight"], state)
    return plain.to(torch.float32)
