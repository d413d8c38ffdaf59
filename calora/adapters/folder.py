"""An adapter folder: a plain PEFT LoRA, the recovery part beside it, and calora.json, which says what it was made for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from calora.adapters.lora import PREFIX, Adapter
from calora.common.artifacts import (
    read_json,
    read_tensors,
    sha256,
    whole_directory,
    write_json,
    write_tensors,
    write_text,
)
from calora.errors import CaloraError

CONFIG, LORA, RECOVERY, META = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "recovery.safetensors",
    "calora.json",
)
MADE_BY = "run `dvc repro` to make the adapter"


def write_adapter(
    directory: Path,
    adapter: Adapter,
    base: str,
    card: str,
    dtype: torch.dtype,
    notes: Mapping[str, object] | None = None,
) -> None:
    """Write an adapter folder that PEFT reads as a plain LoRA.

    Where there is a recovery part, an extra key in adapter_config.json makes plain PEFT warn that it is not loaded.

    Args:
        base: what `base_model_name_or_path` says.
        card: the text of README.md.
        dtype: of the stored tensors.
        notes: JSON files to put beside them, by name.
    """
    with whole_directory(directory) as scratch:
        adapter.config.base_model_name_or_path = base
        adapter.config.inference_mode = True
        adapter.config.save_pretrained(str(scratch))
        config = json.loads((scratch / CONFIG).read_text())
        for key in ("target_modules", "exclude_modules"):  # sets in PEFT, whose order differs from process to process
            if isinstance(config[key], list):
                config[key].sort()
        if adapter.recovery:
            config["calora"] = f"the recovery part is in {RECOVERY}: load this folder with calora to use it"
        write_json(scratch / CONFIG, config)
        write_tensors(scratch / LORA, {PREFIX + key: tensor.to(dtype) for key, tensor in adapter.lora.items()})
        if adapter.recovery:
            write_tensors(scratch / RECOVERY, {key: tensor.to(dtype) for key, tensor in adapter.recovery.items()})
        if adapter.meta:
            hashes = {file.name: sha256(file) for file in sorted(scratch.glob("*.safetensors"))}
            write_json(scratch / META, {**adapter.meta, "sha256": hashes})
        write_text(scratch / "README.md", card)
        for name, note in (notes or {}).items():
            write_json(scratch / name, note)


def lora_bytes(directory: Path) -> int:
    """Bytes of an adapter folder that its LoRA needs: the weights and their configuration."""
    return sum((directory / name).stat().st_size for name in (CONFIG, LORA))


def read_plain_lora(directory: Path, made_by: str = MADE_BY) -> Adapter:
    """Read a PEFT LoRA folder (safetensors only)."""
    config = read_json(directory / CONFIG, made_by)
    if config.get("peft_type") != "LORA":
        raise CaloraError(directory / CONFIG, "peft_type LORA", config.get("peft_type"), "name a LoRA adapter")
    config.pop("calora", None)
    tensors = read_tensors(directory / LORA, made_by)
    lora = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
    made: Any = LoraConfig
    return Adapter(made.from_peft_type(**config), lora)


def read_adapter(directory: Path) -> Adapter:
    """Read a CA-LoRA adapter folder: the LoRA, the recovery part if it has one, and calora.json.

    Raises:
        CaloraError: a file is missing, truncated, or not the one that calora.json tells of.
    """
    adapter = read_plain_lora(directory)
    adapter.meta = read_json(directory / META, MADE_BY)
    if adapter.meta.get("recovery"):
        adapter.recovery = read_tensors(directory / RECOVERY, MADE_BY)
    for name, expected in adapter.meta.pop("sha256").items():
        found = sha256(directory / name)
        if found != expected:
            raise CaloraError(directory / name, f"SHA-256 {expected}", found, f"it was edited: {MADE_BY}")
    return adapter
