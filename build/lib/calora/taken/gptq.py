"""GPTQ's layout, as GPTQModel and AutoGPTQ write it: 2, 3, 4 or 8 bits in int32 words along the inputs.

`qweight` int32 [in bits / 32, out]; `qzeros` int32 [groups, out bits / 32], less 1 but in gptq_v2; `scales` [groups, out];
`g_idx` int32 [in], the group of each input: w = (code - zero) * scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from calora.errors import CaloraError
from calora.taken.values import OnGrid, Values, from_words, grid_of, grouped, signed

MARK = "qweight"
PARTS = ("qweight", "qzeros", "scales", "g_idx")
LAYOUTS = ("gptq", "gptq_v2")


def check(settings: Mapping[str, Any], where: str) -> None:
    """Raise `CaloraError` unless it is a layout that is read here."""
    if layout_of(settings) not in LAYOUTS:
        fix = "save it with GPTQModel in one of them"
        raise CaloraError(where, f"one of GPTQ's layouts {', '.join(LAYOUTS)}", layout_of(settings), fix)


def layout_of(settings: Mapping[str, Any]) -> str:
    """The layout that `quantization_config` names."""
    return str(settings.get("checkpoint_format") or settings.get("format") or LAYOUTS[0])


def read(parts: Mapping[str, Tensor], settings: Mapping[str, Any], shape: tuple[int, int]) -> Values:
    """The weight [out, in] of one layer; plain values where inputs are not in groups of one size.

    Args:
        parts: its tensors by the last part of their names.
        settings: `quantization_config`.
        shape: [out, in].
    """
    out, width = shape
    bits = parts["qweight"].shape[0] * 32 // width
    codes = signed(from_words(parts["qweight"], bits, width, 0), bits).T  # [out, in]
    zero = signed(_zeros(parts["qzeros"], bits, out, less_1=layout_of(settings) == "gptq"), bits).T  # [out, groups]
    values = OnGrid(codes.contiguous(), grid_of(parts["scales"].T, zero, bits))
    index = parts.get("g_idx")
    return values if index is None else grouped(values, index.long())


def _zeros(words: Tensor, bits: int, out: int, less_1: bool) -> Tensor:
    """uint8 [groups, out]. What was subtracted from whole words is added to whole words: it may have borrowed."""
    if less_1 and 32 % bits == 0:
        ones = sum(1 << at for at in range(0, 32, bits))
        return from_words(words + (ones if ones < 2**31 else ones - 2**32), bits, out, 1)
    numbers = from_words(words, bits, out, 1)
    return (numbers + 1) & (2**bits - 1) if less_1 else numbers
