"""The `quantization_config` of config.json: the ecosystem's own format where it can hold the whole model, else ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ENTRY = ("kind", "format", "in", "out", "rows", "width", "padding", "dtype", "sparse", "group", "symmetric", "outliers")
EXPERTS = ("kind", "inputs", "output", "experts", "shared", "size", "active", "threshold", "router")


def quantization_config(report: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says, from the report of `compress` and its `tied` tensors."""
    layers = {name: {key: value for key, value in entry.items() if key in (*ENTRY, *EXPERTS)} for name, entry in report["layers"].items()}
    return {"quant_method": "calora", "layers": layers, "tied": report["tied"]}
