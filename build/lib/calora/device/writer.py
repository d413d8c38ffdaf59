"""GGUF files: a compressed base, and adapters as LoRAs beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from calora.adapters.lora import Adapter
from calora.device.architecture import Architecture
from calora.device.blocks import BLOCK, Blocks, NoExactType, exact, plain, relative_error, rounded
from calora.device.entries import MARK
from calora.errors import CaloraError
from calora.layers.experts import Experts
from calora.layers.layout import own_weight
from calora.recovery.shared import CHILD

ADAPTER_TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "Q8_0": torch.bfloat16}
ROUND = "or let it be rounded (--requantise Q8_0)"


def base_tensors(
    model: PreTrainedModel, architecture: Architecture, requantise: str | None = None
) -> tuple[dict[str, Blocks], dict[str, dict[str, Any]]]:
    """The tensors of base.gguf, without recoveries.

    Args:
        model: in its stored form (`calora.compressed.stored_form`).
        requantise: the type of layers that have no exact one; without it they are refused.

    Returns:
        Name -> tensor; and layer -> what it was, its type now and the relative error, where it was rounded.

    Raises:
        CaloraError: a layer has no exact type, or llama.cpp has no such tensor.
    """
    name, tensors, changed = architecture.tensor_name(), dict[str, Blocks](), dict[str, dict[str, Any]]()
    tied = model.get_output_embeddings() if model.config.tie_word_embeddings else None
    for path, module in model.named_modules():
        if isinstance(module, Experts):
            raise _refused(path, NoExactType("a feed-forward of experts", "compress without `moefy`", final=True))
        if module is tied or path.rpartition(".")[2] == CHILD:
            continue
        matrix = isinstance(module, nn.Linear | nn.Embedding)
        vectors = {part: p for part, p in module.named_parameters(recurse=False) if not (matrix and part == "weight")}
        if matrix:
            blocks, note = weight(path, module, requantise)
            tensors[name(f"{path}.weight")] = _ordered(blocks, architecture, path)
            changed |= {path: note} if note else {}
        for part, tensor in vectors.items():
            tensors[name(f"{path}.{part}")] = _ordered(plain(tensor), architecture, path)
    return tensors | architecture.rope_factors(model), changed


def weight(path: str, layer: nn.Module, requantise: str | None) -> tuple[Blocks, dict[str, Any] | None]:
    """A layer's weight, and what was lost of it."""
    try:
        return exact(layer), None
    except NoExactType as reason:
        if requantise is None or reason.final:
            raise _refused(path, reason) from None
        values = own_weight(layer, torch.float32)
        blocks = rounded(values, requantise)
        return blocks, {"was": reason.found, "type": requantise, "error": round(relative_error(blocks, values), 6)}


def _refused(path: str, reason: NoExactType) -> CaloraError:
    fix = reason.fix if reason.final else f"{reason.fix}, {ROUND}"
    return CaloraError(f"export to gguf, {path}", "numbers that a type of GGUF holds exactly", reason.found, fix)


def _ordered(blocks: Blocks, architecture: Architecture, path: str) -> Blocks:
    order = architecture.order(path)
    return blocks if order is None else blocks.rows(order)


def adapter_tensors(adapter: Adapter, architecture: Architecture, kind: str) -> dict[str, Blocks]:
    """The tensors of an adapter that was folded: A [r, in] and B [out, r], its scale in B.

    Args:
        kind: BF16 (what torch computes with), F16, F32, or Q8_0: then B too where 32 divides its rank, else it is BF16.

    Raises:
        CaloraError: there is no such kind, or llama.cpp has no such layer.
    """
    if kind not in ADAPTER_TYPES:
        raise CaloraError("adapter_type", f"one of {', '.join(ADAPTER_TYPES)}", kind, "choose one of them")
    name, tensors = architecture.tensor_name(), dict[str, Blocks]()
    for layer in adapter.lora_layers:
        a, b = (adapter.lora[f"{layer}.lora_{side}.weight"] for side in "AB")
        target = name(f"{layer}.weight")
        for side, factor in (("a", a), ("b", architecture.in_order(layer, b))):
            tensors[f"{target}.lora_{side}"] = _factor(factor, kind)
    return tensors


def _factor(factor: Tensor, kind: str) -> Blocks:
    if kind == "Q8_0" and factor.shape[1] % BLOCK == 0:
        return rounded(factor, kind)
    return plain(factor.to(ADAPTER_TYPES[kind]))


def write_base(
    path: Path, architecture: Architecture, tensors: Mapping[str, Blocks], entries: Mapping[str, str], vocabulary: Any
) -> None:
    """Write base.gguf; `vocabulary` is a function that adds the tokenizer to a writer, `entries` our own metadata."""

    def describe(writer: gguf.GGUFWriter) -> None:
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        architecture.describe(writer)
        vocabulary(writer)

    write_gguf(path, architecture.name, describe, tensors, entries)


def write_lora(
    path: Path, architecture: Architecture, tensors: Mapping[str, Blocks], entries: Mapping[str, str]
) -> None:
    """Write an adapter. Its alpha is 0, by which llama.cpp multiplies by 1: it would divide one alpha by each tensor's own rank."""

    def describe(writer: gguf.GGUFWriter) -> None:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)

    write_gguf(path, architecture.name, describe, tensors, entries)


def write_gguf(
    path: Path,
    architecture: str,
    describe: Callable[[gguf.GGUFWriter], None],
    tensors: Mapping[str, Blocks],
    entries: Mapping[str, str],
) -> None:
    """Write a file and read it back.

    Raises:
        CaloraError: what is read is not what was written (a broken disk).
    """
    writer = gguf.GGUFWriter(path, architecture)
    describe(writer)
    for key, value in entries.items():
        writer.add_string(f"{MARK}{key}", value)
    for name, blocks in tensors.items():
        writer.add_tensor(name, blocks.data, raw_dtype=blocks.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for name, blocks in tensors.items():
        same = name in read and np.array_equal(
            read[name].data.reshape(-1).view(np.uint8), blocks.data.reshape(-1).view(np.uint8)
        )
        if not same:
            raise CaloraError(
                f"{path}, {name}", "what was written", "something else", "check the disk, then export again"
            )


def told(value: object) -> str:
    """An entry as text."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
