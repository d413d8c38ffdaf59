"""An uncompressed base and plain LoRAs of it, to be exported: what a compressed one is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from calora.adapters.folder import META
from calora.adapters.lora import Adapter
from calora.adapters.teachers import WHOLE, Whole, import_adapter
from calora.common.files import fingerprint, read_json
from calora.errors import CaloraError
from calora.models.loading import load_model
from calora.models.tasks import Task
from calora.saving import REPORT

METHOD = "lora"  # of an adapter that is as its owner trained it


def read_uncompressed(base: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model in the dtype that it is stored in, and what compression.json would say of it: both fingerprints are the same.

    Raises:
        CaloraError: it is no folder of a model, or one that is compressed without calora's compression.json.
    """
    fix = "name the folder of a model that calora compressed, or of an uncompressed one"
    if "quantization_config" in read_json(base / "config.json", fix):
        raise CaloraError(base, f"{REPORT}, or uncompressed weights", "weights that are compressed already", fix)
    dtype = AutoConfig.from_pretrained(base, local_files_only=True).dtype
    model = load_model(base, dtype if isinstance(dtype, torch.dtype) else torch.float32)
    same = fingerprint(base)
    return model, {"base_fingerprint": same, "fingerprint": same, "recipe": []}


def read_plain(path: Path, name: str | None, model: PreTrainedModel, tasks: Mapping[str, Task]) -> Adapter:
    """A plain LoRA of an uncompressed base, with its task.

    Args:
        name: under which it is exported; None: its folder's.
        model: the base, which is only looked at.

    Raises:
        CaloraError: it is an adapter of a compressed base, more than a plain LoRA or of another base, or its task is not given.
    """
    name = name or path.name
    if (path / META).exists():
        expected, found = "a plain LoRA, which an uncompressed base takes", "one that was made for a compressed base"
        raise CaloraError(f"adapter {path}", expected, found, "name that base")
    read = import_adapter(path, model)
    if isinstance(read, Whole) or (path / WHOLE).exists():
        more = ", ".join(read.beyond) if isinstance(read, Whole) else f"what {WHOLE}/ holds"
        raise CaloraError(f"adapter {path}", "a plain LoRA: llama.cpp has nothing else", more, "leave it out")
    if name not in tasks:
        known = f"tasks of {', '.join(tasks)}" if tasks else "none"
        raise CaloraError(
            f"adapter {path}", f"the task of {name}", known, f"give it: --task {name}=data/{name}/task.json"
        )
    read.meta = {"task": tasks[name].to_json(), "method": METHOD}
    return read
