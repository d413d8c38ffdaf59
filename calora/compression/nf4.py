"""nf4 layers: bitsandbytes' own `Linear4bit`, made, stored and restored without a GPU."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn


def _bitsandbytes() -> Any:
    """Imported only where a recipe uses nf4: it takes seconds."""
    return import_module("bitsandbytes")


def _empty(in_features: int, out_features: int, bias: bool, dtype: torch.dtype) -> Any:
    bnb = _bitsandbytes()

    with torch.device("meta"):
        layer = bnb.nn.Linear4bit(
            in_features, out_features, bias, compute_dtype=dtype, compress_statistics=True, quant_type="nf4",
            quant_storage=dtype,
        )  # fmt: skip
    # Its fast CPU kernel reshapes by blocks of 64 inputs and fails where a row does not hold whole ones.
    layer.support_avx512bf16_for_cpu = layer.support_avx512bf16_for_cpu and in_features % 64 == 0
    return layer.requires_grad_(False)


def pack_nf4(layer: nn.Linear) -> Any:
    """A dense layer as bitsandbytes nf4 with double quantisation (arXiv 2305.14314, section 3)."""
    bnb = _bitsandbytes()

    packed = _empty(layer.in_features, layer.out_features, layer.bias is not None, layer.weight.dtype)
    packed.weight = bnb.nn.Params4bit(
        layer.weight.detach().clone(),
        requires_grad=False,
        quant_type="nf4",
        compress_statistics=True,
        quant_storage=layer.weight.dtype,  # T5 casts a layer's input to the dtype of its weight: never to uint8
    ).to("cpu")
    packed.weight.module = packed
    packed.quant_state = packed.weight.quant_state
    if layer.bias is not None:
        packed.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
    return packed


def restore_nf4(in_features: int, out_features: int, dtype: torch.dtype, tensors: dict[str, Tensor]) -> Any:
    """The inverse of a layer's `state_dict()`: `weight`, `weight.absmax`, ..., and `bias` if there is one."""
    bnb = _bitsandbytes()

    packed = _empty(in_features, out_features, "bias" in tensors, dtype)
    stats = {name.removeprefix("weight."): t for name, t in tensors.items() if name.startswith("weight.")}
    packed.weight = bnb.nn.Params4bit.from_prequantized(
        data=tensors["weight"], quantized_stats=stats, requires_grad=False, device="cpu", module=packed
    )
    packed.quant_state = packed.weight.quant_state
    if "bias" in tensors:
        packed.bias = nn.Parameter(tensors["bias"], requires_grad=False)
    return packed


def dense_nf4(layer: Any, dtype: torch.dtype) -> Tensor:
    """W [out, in] of an nf4 layer in `dtype`."""
    bnb = _bitsandbytes()

    layer.state_dict()  # undoes the reordering that the CPU kernel leaves behind in the weight
    weight: Tensor = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return weight.to(dtype)
