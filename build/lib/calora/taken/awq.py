"""AutoAWQ's layout (`gemm`): 4 bits, eight columns in an int32 word, even ones before odd ones.

`qweight` int32 [in, out / 8]; `qzeros` int32 [groups, out / 8]; `scales` fp16 [groups, out]: w = (code - zero) * scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from calora.errors import CaloraError
from calora.taken.values import OnGrid, Values, from_words, grid_of, signed

MARK = "qweight"
PARTS = ("qweight", "qzeros", "scales")
BITS = 4
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # where in a word each of eight neighbours is


def check(settings: Mapping[str, Any], where: str) -> None:
    """Raise `CaloraError` unless it is a layout that is read here."""
    found = f"{settings.get('version', 'gemm')}, {settings.get('bits', settings.get('w_bit', BITS))} bits".lower()
    if found != f"gemm, {BITS} bits":
        raise CaloraError(where, f"AWQ's layout gemm of {BITS} bits", found, "quantise it anew with version GEMM")


def read(parts: Mapping[str, Tensor], settings: Mapping[str, Any], shape: tuple[int, int]) -> Values:
    """The weight [out, in] of one layer."""
    codes, zero = (signed(_columns(parts[name], shape[0]), BITS).T for name in ("qweight", "qzeros"))
    return OnGrid(codes.contiguous(), grid_of(parts["scales"].T, zero, BITS))


def _columns(words: Tensor, out: int) -> Tensor:
    """uint8 [..., out]."""
    numbers: Tensor = from_words(words, BITS, out, 1).unflatten(1, (-1, 8))
    return numbers[..., list(PLACES)].flatten(1)
