"""torchao's layouts in safetensors: `_weight_qdata` and `_weight_scale`, and in the file's header what kind of tensor they are of.

Int8Tensor and IntxUnpackedToInt8Tensor are codes and groups of inputs: w = (code - zero) * scale. Float8Tensor is plain values.
Others are plain values too, unpacked by torchao itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from calora.errors import CaloraError
from calora.taken.values import OnGrid, Values, grid_of

INTEGERS = ("Int8Tensor", "IntxUnpackedToInt8Tensor")
PLAIN = "Float8Tensor"
PREFIX = "_weight_"


def kinds_of(header: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Name of a weight -> what the file's header says of it, for those that are no plain tensors."""
    told = {name: json.loads(text) for name, text in header.items() if text.startswith("{")}
    return {name: kind for name, kind in told.items() if kind.get("_type", "Tensor") != "Tensor"}


def check(kinds: Mapping[str, Mapping[str, Any]], where: str) -> None:
    """Raise `CaloraError` where a kind of tensor needs torchao, which is not there."""
    for kind in kinds.values():
        if kind["_type"] not in (*INTEGERS, PLAIN) and find_spec("torchao") is None:
            raise CaloraError(
                where, "torchao, to unpack its tensors", f"{kind['_type']} and no such package", "pip install torchao"
            )


def read(name: str, parts: Mapping[str, Tensor], kind: Mapping[str, Any], header: Mapping[str, str]) -> Values:
    """The weight [out, in] of one layer."""
    own = {part.removeprefix(PREFIX): tensor for part, tensor in parts.items() if part.startswith(PREFIX)}
    if kind["_type"] in INTEGERS and kind["_data"]["block_size"][0] == 1:
        dtype = kind["_data"].get("target_dtype", {}).get("_data", "int8")
        bits = int(dtype.removeprefix("int"))
        zero = own.get("zero_point")
        if bits in (2, 3, 4, 8) and (zero is None or bool((zero == zero.to(torch.int8)).all())):
            return OnGrid(own["qdata"], grid_of(own["scale"], zero, bits))
    if kind["_type"] == PLAIN:
        rows, columns = kind["_data"]["block_size"]
        return own["qdata"].float() * own["scale"].float().repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    support: Any = import_module("torchao.prototype.safetensors.safetensors_support")
    module = name.rpartition(".")[0]
    made, _ = support.unflatten_tensor_state_dict(
        {f"{module}.{part}": tensor for part, tensor in parts.items()}, header
    )
    plain: Tensor = made[name].dequantize()
    return plain.float()
