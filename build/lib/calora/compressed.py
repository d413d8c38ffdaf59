"""A compressed model in memory: a transformers model with packed layers and hot-swappable adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from calora.adapters.folder import read_adapter
from calora.adapters.lora import attach_adapter, detach_adapter, set_active
from calora.adapters.origin import Origin
from calora.adapters.prompts import task_of
from calora.common.files import check_tensors, fingerprint, read_json
from calora.common.tensors import read_tensors, stored_tensors
from calora.errors import CaloraError
from calora.evaluation.choice import Choice, rows_of
from calora.evaluation.predict import complete, predict, scores
from calora.layers.layout import build, prepared
from calora.layers.onetoken import OneToken
from calora.layers.precision import compute_in
from calora.models.anatomy import linear_layers
from calora.models.loading import attention_of, compute_dtype, load_tokenizer, model_class
from calora.models.moments import read_together
from calora.models.tasks import Example, Task, encode_all, positions
from calora.models.uniform import uniform, was_conv1d
from calora.recovery.beside import Sides
from calora.recovery.shared import unpack
from calora.saving import KEPT, REPORT, VERSION, WEIGHTS

GENERATION = "generation_config.json"
FIX = "make the compressed model again, or name another folder"


class Compressed(OneToken, PreTrainedModel):
    """What `calora.load` makes of a transformers model: it takes adapters by name, and answers plain texts."""

    calora_fingerprint: str
    calora_origin: Origin
    calora_tokenizer: PreTrainedTokenizerBase
    calora_tasks: dict[str, Task]

    def load_adapter(self, path: str | Path, name: str) -> None:  # type: ignore[override]  # transformers' knows no bypass
        """Load a CA-LoRA adapter folder under `name`; one that is loaded where there is none becomes active.

        Raises:
            CaloraError: the name is taken, the folder is not an adapter, or it was made for another compressed base;
                the model is as it was before.
        """
        if name in self.calora_tasks:
            raise CaloraError(
                "load_adapter", "a name that is free", f"{name!r}, which is taken", "unload_adapter it first"
            )
        adapter = read_adapter(Path(path))
        made_for, task = adapter.meta["compressed_fingerprint"], task_of(path, adapter.meta["task"])
        if made_for != self.calora_fingerprint:
            raise CaloraError(
                f"adapter {path}",
                f"the compressed base that it was made for, {made_for}",
                f"the loaded base {self.calora_fingerprint}",
                "load that base, or make an adapter for this one",
            )
        try:
            attach_adapter(self, adapter, name)
        except BaseException:
            set_active(self, self.calora_active)
            raise
        self.calora_tasks[name] = task
        self.set_adapter(name if len(self.calora_tasks) == 1 else self.calora_active)

    def unload_adapter(self, name: str) -> None:
        """Take the adapter `name` off; if it was active, none is then."""
        if name not in self.calora_tasks:
            raise CaloraError("unload_adapter", f"one of {sorted(self.calora_tasks)}", name, "name one that is loaded")
        detach_adapter(self, name)
        del self.calora_tasks[name]
        self.set_adapter(None if self.calora_active == name else self.calora_active)

    def set_adapter(self, name: str | None) -> None:  # type: ignore[override]
        """Switch to the adapter `name` (its LoRA, bypass and scales); None uses the compressed model alone."""
        if name is not None and name not in self.calora_tasks:
            raise CaloraError("set_adapter", f"one of {sorted(self.calora_tasks)}", name, "load it with load_adapter")
        self.calora_active = name
        set_active(self, name)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Refused where layers are in the form that a CPU computes with, or use a task's scales: it is not the stored one.

        Raises:
            CaloraError: the model was loaded packed, or is a GPT-2.
        """
        if any(prepared(module) for module in self.modules()):
            fix = "copy the folder that it was loaded from, or load it with dense=True"
            found = "the form that a CPU computes with, or to train on, or a task's scales"
            raise CaloraError("save_pretrained", "layers in their stored form", found, fix)
        if was_conv1d(self):  # transformers would read the weights of linear layers as those of Conv1D: transposed
            found = f"linear layers, which are Conv1D in transformers' {self.config.model_type}"
            fix = "copy the folder that it was loaded from"
            raise CaloraError("save_pretrained", "layers in their stored form", found, fix)
        super().save_pretrained(*args, **kwargs)

    def answer(self, texts: Sequence[str | Mapping[str, Any]], batch_size: int = 16) -> list[str]:
        """Answer texts with the active adapter's task: a text, or a mapping with the prompt's columns."""
        task, examples = self._asked(texts)
        return predict(self, task, self.calora_tokenizer, examples, batch_size).answers

    def choose(self, texts: Sequence[str | Mapping[str, Any]], batch_size: int = 16) -> list[Choice]:
        """The most probable of each text's answers, and how probable each is.

        Raises:
            CaloraError: no adapter is active, or its task writes its answers.
        """
        task, examples = self._asked(texts)
        if not task.scored:
            raise CaloraError(f"choose, task {task.name}", "a task with answers", "one that writes them", "call answer")
        found = scores(self, task, self.calora_tokenizer, examples, batch_size)
        return [
            Choice.of(example.choices, own.softmax(-1).tolist(), len(example.prompt_ids))
            for example, own in zip(examples, found, strict=True)
        ]

    def complete(self, prompts: Sequence[str], max_new_tokens: int, batch_size: int = 16) -> list[str]:
        """What the model writes behind each prompt, greedily, up to an end token."""
        ids = self.calora_tokenizer(list(prompts)).input_ids
        return complete(self, self.calora_tokenizer, ids, max_new_tokens, batch_size)

    def _asked(self, texts: Sequence[str | Mapping[str, Any]]) -> tuple[Task, list[Example]]:
        task = self.calora_tasks.get(self.calora_active or "")
        if task is None:
            raise CaloraError("answer", "an active adapter", "none", "call load_adapter and set_adapter first")
        return task, encode_all(task, self.calora_tokenizer, rows_of(task, texts), positions(self.config))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Compressed:
        """Move, or change the dtype."""
        moved: Compressed = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.calora_sides is not None:
            self.calora_sides.apply(fn)
        return moved

    calora_active: str | None = None
    calora_sides: Sides | None = None  # what is beside the layers of a packed model; on the dense view PEFT has it


def load(
    path: str | Path,
    dense: bool = False,
    trainable: bool = False,
    attention: str = "sdpa",
    device: str = "cpu",
    dtype: torch.dtype | None = None,
) -> Compressed:
    """Load a compressed model: a transformers model with packed layers that also takes CA-LoRA adapters.

    Args:
        path: a folder that the compress stage (or `calora.save`) wrote.
        dense: unpack every layer: the same values, more memory, fast to train.
        trainable: to train adapters on packed layers: each weight is unpacked within a call, forward and backward. The
            values of `dense`, about its bytes less, and slower.
        attention: `sdpa` (eager where the model's class has none), or `eager`, to train on a CPU.
        device: where to put it; on a CPU packed layers take the form that its kernels compute with.
        dtype: to compute in; by default the stored one, or fp32 for bf16 where the processor has no kernels for it.

    Raises:
        CaloraError: a file is missing, truncated, or not the one that compression.json describes.
    """
    if dense and trainable:
        raise CaloraError("load", "dense or trainable", "both", "name one: dense layers can be trained on anyway")
    directory = Path(path)
    report = _checked_report(directory)
    model = _empty_model(directory, attention)
    cls, config = type(model), model.config
    compute = dtype or (compute_dtype() if config.dtype == torch.bfloat16 else config.dtype)
    with stored_tensors(directory / WEIGHTS) as tensors:
        ready = not dense and not trainable and device == "cpu"
        how = {"dense": dense, "trainable": trainable, "ready": ready}
        build(model, report["layers"], tensors, report["tied"], **how, compute=compute)
    uniform(model)  # what was not compressed is stored as the base has it
    compute_in(model, compute, config.dtype)
    if dense:
        model.tie_weights()
    _check_filled(directory, model)
    model.__class__ = type(f"Compressed{cls.__name__}", (Compressed, cls), {})
    model.calora_fingerprint, model.calora_tasks = report["fingerprint"], {}
    kept = read_tensors(directory / KEPT, FIX) if (directory / KEPT).exists() else {}
    model.calora_origin = Origin(kept, report["layers_kept"])
    model.calora_tokenizer = load_tokenizer(directory)
    if (directory / GENERATION).exists():
        model.generation_config = _generation(directory)
    loaded: Compressed = model.to(device).eval().requires_grad_(False)
    if not dense and not trainable:
        unpack(loaded, compute)
        loaded.calora_sides = Sides(linear_layers(loaded), read_together(loaded))
    return loaded


def stored_form(path: str | Path) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model with its layers as they are stored, to read and not to compute with, and its compression.json.

    Raises:
        CaloraError: as `load`.
    """
    directory = Path(path)
    report, model = _checked_report(directory), _empty_model(directory, "eager")
    with stored_tensors(directory / WEIGHTS) as tensors:
        build(model, report["layers"], tensors, report["tied"])
    _check_filled(directory, model)
    return model, report


def _checked_report(directory: Path) -> dict[str, Any]:
    """compression.json, if the weights are those that it describes."""
    report = read_json(directory / REPORT, FIX)
    if report.get("version") != VERSION:
        found = f"version {report.get('version', 1)}"
        raise CaloraError(directory / REPORT, f"version {VERSION}", found, f"another calora wrote it: {FIX}")
    check_tensors(directory / WEIGHTS, FIX)
    found = fingerprint(directory)
    if found != report["fingerprint"]:
        raise CaloraError(directory / WEIGHTS, f"fingerprint {report['fingerprint']}", found, f"it was edited: {FIX}")
    return report


def _empty_model(directory: Path, attention: str) -> Any:
    """The model without its tensors."""
    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    cls: Any = model_class(config, directory)
    with init_empty_weights(include_buffers=False):
        return cls._from_config(config, dtype=config.dtype, attn_implementation=attention_of(attention))


def _check_filled(directory: Path, model: PreTrainedModel) -> None:
    empty = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if empty:
        raise CaloraError(directory / WEIGHTS, f"a tensor {empty[0]}", "none", FIX)


def _generation(directory: Path) -> GenerationConfig:
    """What the base's publisher set for generation: its end tokens, for example."""
    try:
        read: GenerationConfig = GenerationConfig.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        found = " ".join(str(error).split())
        raise CaloraError(directory / GENERATION, "generation settings of transformers", found, FIX) from None
    return read
