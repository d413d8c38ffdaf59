"""The folders that adapters come in: PEFT's (which unsloth, axolotl, LLaMA-Factory and TRL write too) and mlx-lm's."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from calora.adapters.codes import FIX
from calora.adapters.features import MERGE, PLAIN, refused
from calora.adapters.places import adapter_files, is_mlx
from calora.common.files import read_json
from calora.common.tensors import read_tensors
from calora.errors import CaloraError

MLX_KINDS = ("lora", "dora")
MLX_FACTOR = re.compile(r"(?P<layer>.+)\.(?P<part>lora_a|lora_b|m)")
MLX_NAMES = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"}


def read_folder(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The entries of adapter_config.json and the tensors, as PEFT writes them.

    Raises:
        CaloraError: a file is missing or broken, or mlx-lm's folder holds something that PEFT has no counterpart of.
    """
    config, weights = adapter_files(directory)
    raw, tensors = read_json(config, FIX), read_tensors(weights, FIX)
    return from_mlx(config, raw, weights, tensors) if is_mlx(directory) else (raw, tensors)


def from_mlx(
    config: Path, raw: Mapping[str, Any], weights: Path, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """mlx-lm's adapter as PEFT's: y = W x + scale (x a) b with a [in, r], b [r, out], so A = a^T, B = b^T, alpha = scale r.

    Its DoRA is PEFT's: a magnitude m [out] over the norm of each row. The scale is used as it stands, whatever the rank.

    Raises:
        CaloraError: the whole model was trained, a tensor is no factor of a linear layer, or the scale is ambiguous.
    """
    kind, parameters = raw.get("fine_tune_type", "lora"), raw.get("lora_parameters")
    if kind not in MLX_KINDS:
        found = f"fine_tune_type: {kind}"
        raise refused(config, "a model that was trained whole", found, "convert it to a base, and name that base")
    if not isinstance(parameters, Mapping):
        raise CaloraError(config, "lora_parameters, as mlx-lm writes them", repr(parameters)[:60], FIX)
    factors: dict[str, Tensor] = {}
    for key, tensor in sorted(tensors.items()):
        match = MLX_FACTOR.fullmatch(key)
        if match is None or tensor.ndim > 2 or match["layer"].endswith("embed_tokens"):
            raise refused(weights, _mlx_part(key, tensor), f"{key} {tuple(tensor.shape)}", MERGE)
        factors[f"{match['layer']}.{MLX_NAMES[match['part']]}"] = tensor.T.contiguous() if tensor.ndim == 2 else tensor
    ranks = {key.removesuffix(".lora_A.weight"): len(a) for key, a in factors.items() if key.endswith(".lora_A.weight")}
    scale = _mlx_scale(config, raw, parameters)
    peft = {
        "peft_type": "LORA", "r": max(ranks.values(), default=1), "target_modules": sorted(ranks),
        "rank_pattern": {}, "use_dora": kind == "dora", "base_model_name_or_path": raw.get("model"),
    }  # fmt: skip
    peft["lora_alpha"] = scale * peft["r"]
    return peft, factors


def _mlx_part(key: str, tensor: Tensor) -> str:
    """What a tensor is that PEFT's LoRA of linear layers has no place for."""
    if key.endswith(("_scales", "_biases")):
        return "a LoRA in codes"
    if ".lora_" in key:
        return "LoRA on experts (3-D tensors)" if tensor.ndim > 2 else "LoRA on embeddings, and on a head tied to them"
    return "layers that are trained whole"


def _mlx_scale(config: Path, raw: Mapping[str, Any], parameters: Mapping[str, Any]) -> float:
    """The factor of the LoRA; releases that wrote `lora_layers` may have multiplied it by alpha / rank."""
    scale, alpha, rank = (parameters.get(key) for key in ("scale", "alpha", "rank"))
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise CaloraError(config, "a number for lora_parameters.scale", repr(scale), PLAIN)
    if alpha is not None and alpha != rank and raw.get("num_layers") is None:
        found = f"scale {scale} and alpha {alpha}, of a release that may have multiplied them"
        fix = "remove alpha, or (where mlx-lm computed scale x alpha / rank) put that product into scale"
        raise CaloraError(config, "a scale alone in lora_parameters", found, fix)
    return float(scale)
