"""An adapter folder: a plain PEFT LoRA, the recovery part and the scales beside it, and calora.json: what it was made for."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from calora.adapters.codes import FIX, FORMATS, decode_recovery, encode_recovery
from calora.adapters.features import plain_lora
from calora.adapters.lora import PREFIX, Adapter
from calora.adapters.places import CONFIG, LORA
from calora.adapters.prompts import task_of
from calora.common.files import check_tensors, read_json, sha256, whole_directory, write_json, write_text
from calora.common.tensors import read_tensors, write_tensors
from calora.common.versions import versions
from calora.errors import CaloraError
from calora.recovery.bypass import ACTIVATIONS

RECOVERY, SCALES, META = "recovery.safetensors", "scales.safetensors", "calora.json"
# Entries of calora.json that describe the folder itself.
ABOUT = ("lora", "recovery", "recovery_format", "scales", "versions", "sha256")


def write_adapter(
    directory: Path,
    adapter: Adapter,
    base: str,
    card: str,
    dtype: torch.dtype,
    notes: Mapping[str, object] | None = None,
    recovery_format: str = "bf16",
) -> None:
    """Write an adapter folder; where there is a LoRA, PEFT reads it as a plain one.

    Where there is more than that, an extra key in adapter_config.json makes plain PEFT warn that it is not loaded.

    Args:
        base: what `base_model_name_or_path` says.
        card: the text of README.md.
        dtype: of the stored tensors; of codes, that of their scales. The task's scales are ratios to the base's, minus
            1, so that bf16 keeps their small differences, as it would not keep those of the scales themselves.
        notes: JSON files to put beside them, by name.
        recovery_format: of the recovery part alone: `bf16` (as it is, in `dtype`), `int8` or `int4` (see `codes`).
    """
    if not adapter.meta and adapter.config is None:
        raise CaloraError(directory, "a LoRA, or what calora.json should say", "neither", "give the adapter its meta")
    with whole_directory(directory) as scratch:
        if adapter.config is not None:
            write_json(scratch / CONFIG, _config_json(adapter, adapter.config, base))
            write_tensors(scratch / LORA, {PREFIX + key: tensor.to(dtype) for key, tensor in adapter.lora.items()})
        if adapter.recovery:
            write_tensors(scratch / RECOVERY, encode_recovery(adapter.recovery, recovery_format, dtype))
        if adapter.scales:
            write_tensors(scratch / SCALES, {key: tensor.to(dtype) for key, tensor in adapter.scales.items()})
        if adapter.meta:
            parts = {
                "lora": adapter.config is not None,
                "recovery": bool(adapter.recovery),
                "scales": bool(adapter.scales),
            }
            kind = {"recovery_format": recovery_format} if adapter.recovery else {}
            about = {**adapter.meta, **parts, **kind, "versions": versions()}
            about["sha256"] = {name: sha256(scratch / name) for name in _files(parts)}
            about["sha256"][META] = _digest(about)
            write_json(scratch / META, about)
        write_text(scratch / "README.md", card)
        for name, note in (notes or {}).items():
            write_json(scratch / name, note)


def _config_json(adapter: Adapter, config: LoraConfig, base: str) -> dict[str, Any]:
    own = copy.deepcopy(config)
    own.base_model_name_or_path, own.inference_mode = base, True
    values: dict[str, Any] = own.to_dict()
    for key, value in values.items():
        if isinstance(value, set):  # PEFT's targets: their order differs from process to process
            values[key] = sorted(value)
    more = [name for name, part in ((RECOVERY, adapter.recovery), (SCALES, adapter.scales)) if part]
    if more:
        values["calora"] = f"the rest of it is in {' and '.join(more)}: load this folder with calora to use it"
    return values


def _files(parts: Mapping[str, Any]) -> list[str]:
    """The files that make an adapter, besides calora.json."""
    files = [*((CONFIG, LORA) if parts["lora"] else ()), *((RECOVERY,) if parts["recovery"] else ())]
    return [*files, SCALES] if parts.get("scales") else files  # adapters of before have no such entry


def _digest(about: Mapping[str, Any]) -> str:
    """SHA-256 of all that calora.json says, but for this digest itself."""
    hashes = {name: value for name, value in about["sha256"].items() if name != META}
    text = json.dumps({**about, "sha256": hashes}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_plain_lora(directory: Path) -> Adapter:
    """Read a PEFT LoRA folder (safetensors only), by the tensors' names as PEFT writes them.

    Raises:
        CaloraError: a file is missing or truncated, or the adapter is not a plain LoRA (see `features`).
    """
    config = plain_lora(directory / CONFIG, read_json(directory / CONFIG, FIX))
    tensors = read_tensors(directory / LORA, FIX)
    return Adapter(config, {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()})


def read_adapter(directory: Path) -> Adapter:
    """Read a CA-LoRA adapter folder: calora.json, and the LoRA, the recovery part and the scales that it names.

    A recovery part in codes comes back as the rounded values, in fp32.

    Raises:
        CaloraError: a file is missing, truncated, or not the one that calora.json describes.
    """
    about = read_json(directory / META, FIX)
    _check_about(directory / META, about)
    for name in _files(about):
        if name.endswith(".safetensors"):
            check_tensors(directory / name, FIX)  # a file that was cut short has a clearer message than its hash
        found = sha256(directory / name) if (directory / name).exists() else "no such file"
        if found != about["sha256"][name]:
            raise CaloraError(directory / name, f"SHA-256 {about['sha256'][name]}", found, f"it was edited: {FIX}")
    adapter = read_plain_lora(directory) if about["lora"] else Adapter(None, {})
    if about["recovery"]:
        stored, path = read_tensors(directory / RECOVERY, FIX), directory / RECOVERY
        adapter.recovery = decode_recovery(stored, about.get("recovery_format", "bf16"), path)
    if about.get("scales"):
        adapter.scales = read_tensors(directory / SCALES, FIX)
    adapter.meta = {key: value for key, value in about.items() if key not in ABOUT}
    return adapter


def _check_about(path: Path, about: Mapping[str, Any]) -> None:
    """Raise `CaloraError` unless calora.json has every entry that a reader needs, and is as it was written."""
    kinds = {"lora": bool, "recovery": bool, "sha256": dict, "task": dict, "compressed_fingerprint": str}
    for key, kind in kinds.items():
        if not isinstance(about.get(key), kind):
            raise CaloraError(path, f"an entry '{key}' ({kind.__name__})", repr(about.get(key)), FIX)
    expected = sorted([*_files(about), META])
    if sorted(about["sha256"]) != expected:
        raise CaloraError(path, f"the SHA-256 of {', '.join(expected)}", sorted(about["sha256"]), FIX)
    if about["sha256"][META] != _digest(about):
        raise CaloraError(
            path, f"SHA-256 {about['sha256'][META]} of its entries", _digest(about), f"it was edited: {FIX}"
        )
    if about["recovery"] and about.get("activation") not in ACTIVATIONS:
        raise CaloraError(path, f"an activation among {', '.join(ACTIVATIONS)}", about.get("activation"), FIX)
    if about.get("recovery_format", "bf16") not in FORMATS:  # adapters of before have no such entry
        raise CaloraError(path, f"a recovery_format among {', '.join(FORMATS)}", about["recovery_format"], FIX)
    task_of(path, about["task"])
