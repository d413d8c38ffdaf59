"""The `quantization_config` of config.json: the ecosystem's own format where it can hold the whole model, else ours.

compressed-tensors holds dense int8 and symmetric int4 weights (with or without the embeddings), bitsandbytes nf4 ones; both load in
transformers without calora. A sparse, MoEfied or outlier-keeping model, an asymmetric int4 one, any with int3 or int2
layers or an int4 table, and nf4 with packed embeddings need `calora.plugin`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from calora.layers.nf4 import their_name

OURS = "calora"
ENTRY = (
    "kind", "format", "in", "out", "rows", "width", "padding", "factor", "dtype", "sparse", "group", "symmetric", "outliers",
    "ordered", "inputs", "output", "experts", "shared", "size", "active", "threshold", "router", "recovery",
)  # fmt: skip


def quantization_config(report: Mapping[str, Any], theirs: bool = True) -> dict[str, Any] | None:
    """What config.json says of how the weights are stored, from the report of `compress`; None where all are dense.

    Args:
        theirs: whether the formats of the ecosystem may be used; T5 keeps layers in fp32 under them, whatever is stored.
    """
    layers: Mapping[str, Mapping[str, Any]] = report["layers"]
    entries = {name: {key: entry[key] for key in ENTRY if key in entry} for name, entry in layers.items()}
    kinds = {entry["kind"] for entry in entries.values()}
    if kinds <= {"dense"} and not any("recovery" in entry for entry in entries.values()):
        return None
    packed = [entry for entry in entries.values() if entry["kind"] == "packed"]
    # compressed-tensors 0.20 cannot load an asymmetric grid: it expects its packed zero points unpacked.
    beyond = any(entry["sparse"] or entry["outliers"] or not entry["symmetric"] for entry in packed)
    beyond |= any(entry["format"] not in ("int8", "int4") for entry in packed)
    # It expects plain tables in int8, and nothing beside a layer.
    beyond |= any("factor" in e or e["format"] != "int8" for e in entries.values() if e["kind"] == "embedding")
    beyond |= any("recovery" in entry for entry in entries.values())
    # What was taken keeps the scales that it came with, in their own dtype.
    beyond |= any("take" in step for step in report["recipe"])
    if theirs and kinds <= {"packed", "embedding"} and not beyond:
        return compressed_tensors(entries)
    if theirs and kinds == {"nf4"} and not beyond:
        return bitsandbytes(next(iter(entries.values()))["dtype"])
    return {"quant_method": OURS, "layers": entries, "tied": report["tied"]}


def compressed_tensors(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The configuration of compressed-tensors: one group of layers for each way to store them."""
    groups: dict[str, dict[str, Any]] = {}
    for name, entry in entries.items():
        scheme = _scheme(entry)
        group = groups.setdefault(repr(scheme), {"targets": [], **scheme})
        group["targets"].append(name)
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups.values())},
        "ignore": [],
    }


def _scheme(entry: Mapping[str, Any]) -> dict[str, Any]:
    if entry["format"] == "int8":
        weights: dict[str, Any] = {"num_bits": 8, "strategy": "channel", "symmetric": True}
        return {"format": "int-quantized", "weights": {"type": "int", **weights}}
    weights = {"num_bits": 4, "strategy": "group", "group_size": entry["group"], "symmetric": entry["symmetric"]}
    return {"format": "pack-quantized", "weights": {"type": "int", **weights}}


def stored_as(config: Mapping[str, Any] | None, tensors: dict[str, Tensor], tied: dict[str, str]) -> dict[str, Tensor]:
    """The tensors by the names of their format; `tied` loses what the format cannot tie."""
    method = config["quant_method"] if config else OURS
    if method == "bitsandbytes":
        return {their_name(name): tensor for name, tensor in tensors.items()}
    if method == "compressed-tensors":  # transformers ties weights, never their scales
        scales = [alias for alias in tied if alias.endswith(".weight_scale")]
        return tensors | {alias: tensors[tied.pop(alias)].clone() for alias in scales}
    return tensors


def bitsandbytes(dtype: str) -> dict[str, Any]:
    """The configuration of bitsandbytes' 4-bit layers with double quantisation."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": dtype,
    }
