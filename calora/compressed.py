"""A compressed model on disk and in memory: packed safetensors, compression.json, and hot-swappable adapters."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from calora.adapters import attach_adapter, read_adapter, set_active
from calora.artifacts import (
    check_tensors,
    fingerprint,
    read_json,
    read_tensors,
    stored_tensors,
    whole_directory,
    write_json,
    write_tensors,
)
from calora.errors import CaloraError
from calora.evaluate import predict
from calora.formats import quantization_config, stored_as
from calora.layout import build
from calora.models import load_tokenizer, model_class
from calora.onetoken import OneToken
from calora.origin import Origin
from calora.tasks import Task, encode_all

REPORT = "compression.json"
WEIGHTS, KEPT = "model.safetensors", "kept.safetensors"
VERSION = 2  # of compression.json and of the layers that it describes
MADE_BY = "run `dvc repro` to make the compressed model"
SIZES = (
    "d_ff", "intermediate_size", "num_layers", "num_decoder_layers", "num_hidden_layers", "head_dim",
    "num_key_value_heads", "num_attention_heads", "layer_types",
)  # fmt: skip
CARRIED = ("generation_config.json", "*token*", "*.model", "vocab*", "merges*", "chat_template*")


class Compressed(OneToken, PreTrainedModel):
    """What `calora.load` makes of a transformers model: it takes adapters by name, and answers plain texts."""

    calora_fingerprint: str
    calora_origin: Origin
    calora_tokenizer: PreTrainedTokenizerBase
    calora_tasks: dict[str, Task]

    def load_adapter(self, path: str | Path, name: str) -> None:  # type: ignore[override]  # transformers' knows no bypass
        """Load a CA-LoRA adapter folder under `name`; the first one loaded becomes active.

        Raises:
            CaloraError: the folder is not an adapter, or it was made for another compressed base.
        """
        adapter = read_adapter(Path(path))
        made_for = adapter.meta["compressed_fingerprint"]
        if made_for != self.calora_fingerprint:
            raise CaloraError(
                f"adapter {path}",
                f"the compressed base that it was made for, {made_for}",
                f"the loaded base {self.calora_fingerprint}",
                "load that base, or run the pipeline for this one",
            )
        attach_adapter(self, adapter, name)
        self.calora_tasks[name] = Task.from_json(adapter.meta["task"])
        if len(self.calora_tasks) == 1:
            self.set_adapter(name)
        else:
            set_active(self, self.calora_active)

    def set_adapter(self, name: str | None) -> None:  # type: ignore[override]
        """Switch to the adapter `name` (its LoRA and its bypass); None uses the compressed model alone."""
        if name is not None and name not in self.calora_tasks:
            raise CaloraError("set_adapter", f"one of {sorted(self.calora_tasks)}", name, "load it with load_adapter")
        self.calora_active = name
        set_active(self, name)

    def answer(self, texts: Sequence[str | Mapping[str, Any]], batch_size: int = 16) -> list[str]:
        """Answer texts with the active adapter's task: a text, or a mapping with the prompt's columns."""
        task = self.calora_tasks.get(self.calora_active or "")
        if task is None:
            raise CaloraError("answer", "an active adapter", "none", "call load_adapter and set_adapter first")
        rows = [{task.columns[0]: text} if isinstance(text, str) else text for text in texts]
        examples = encode_all(task, self.calora_tokenizer, rows)
        return predict(self, task, self.calora_tokenizer, examples, batch_size).answers

    calora_active: str | None = None


def save(model: PreTrainedModel, report: Mapping[str, Any], directory: Path, base: Path) -> None:
    """Write a compressed model: packed weights, compression.json, configuration and the base's tokenizer.

    Tensors that are shared in memory (tied embeddings) are stored once. What remains of the original's outputs and
    inputs, where some were cut or moved, goes to kept.safetensors.
    """
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    names: dict[int, str] = {}
    for name, tensor in model.state_dict().items():
        first = names.setdefault(tensor.data_ptr(), name) if tensor.numel() else name
        if first == name:
            tensors[name] = tensor
        else:
            tied[name] = first
    told = {**report, "tied": tied}
    kept = told.pop("kept")
    format = quantization_config(told, theirs=not model._keep_in_fp32_modules)
    tensors = stored_as(format, tensors, tied)
    config = json.loads((base / "config.json").read_text(encoding="utf-8")) | sizes(model)
    with whole_directory(directory) as scratch:
        for pattern in CARRIED:
            for file in base.glob(pattern):
                shutil.copyfile(file, scratch / file.name)
        write_json(scratch / "config.json", config | ({"quantization_config": format} if format else {}))
        write_tensors(scratch / WEIGHTS, tensors)
        if kept:
            write_tensors(scratch / KEPT, kept)
        stored = sum(file.stat().st_size for file in scratch.iterdir())
        total = {
            "version": VERSION,
            "bytes_base": sum(file.stat().st_size for file in base.iterdir() if file.is_file()),
            "bytes_without_this_report": stored,
            "base_fingerprint": fingerprint(base),
            "fingerprint": fingerprint(scratch),
        }
        write_json(scratch / REPORT, {**total, **told})


def sizes(model: PreTrainedModel) -> dict[str, Any]:
    """The entries of config.json that a smaller model of the same kind needs."""
    config = model.config.to_dict()
    return {name: config[name] for name in SIZES if name in config}


def load(path: str | Path, dense: bool = False, attention: str = "sdpa", device: str = "cpu") -> Compressed:
    """Load a compressed model: a transformers model with packed layers that also takes CA-LoRA adapters.

    Args:
        path: a folder that the compress stage (or `calora.save`) wrote.
        dense: unpack every layer to the base's dtype: the same values, more memory, fast to train.
        attention: `sdpa`, or `eager` to train on a CPU.
        device: where to put it; on a CPU packed layers take the form that its kernels compute with.

    Raises:
        CaloraError: a file is missing, truncated, or not the one that compression.json describes.
    """
    directory = Path(path)
    report = read_json(directory / REPORT, MADE_BY)
    if report.get("version") != VERSION:
        found = f"version {report.get('version', 1)}"
        raise CaloraError(directory / REPORT, f"version {VERSION}", found, f"another calora wrote it: {MADE_BY}")
    check_tensors(directory / WEIGHTS, MADE_BY)
    found = fingerprint(directory)
    if found != report["fingerprint"]:
        raise CaloraError(
            directory / WEIGHTS, f"fingerprint {report['fingerprint']}", found, f"it was edited: {MADE_BY}"
        )
    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    config._attn_implementation = attention
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    cls: Any = model_class(config, directory)
    with init_empty_weights(include_buffers=False):
        model = cls._from_config(config, dtype=config.dtype)
    with stored_tensors(directory / WEIGHTS) as tensors:
        build(model, report["layers"], tensors, report["tied"], dense=dense, ready=not dense and device == "cpu")
    if dense:
        model.tie_weights()
    empty = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if empty:
        raise CaloraError(directory / WEIGHTS, f"a tensor {empty[0]}", "none", MADE_BY)
    model.__class__ = type(f"Compressed{cls.__name__}", (Compressed, cls), {})
    model.calora_fingerprint, model.calora_tasks = found, {}
    kept = read_tensors(directory / KEPT, MADE_BY) if (directory / KEPT).exists() else {}
    model.calora_origin = Origin(kept, report["layers_kept"])
    model.calora_tokenizer = load_tokenizer(directory)
    loaded: Compressed = model.to(device).eval().requires_grad_(False)
    return loaded
