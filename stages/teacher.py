"""Train (or import) the LoRA on the uncompressed LLM and store its outputs for every training text.

Reads models/base, data/<task>; writes models/teacher/<task> (a plain PEFT LoRA) and models/targets/<task>.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from calora.adapters import (
    Adapter,
    attach_adapter,
    check_targets,
    lora_config,
    read_plain_lora,
    set_active,
    write_adapter,
)
from calora.artifacts import fingerprint, whole_directory, write_json
from calora.cards import plain_card
from calora.distillation import finetune
from calora.errors import CaloraError
from calora.models import load_model, load_tokenizer
from calora.targets import write_targets
from calora.tasks import Task, encode_all
from calora.training import History
from stages.common import BASE, run, targets, teacher
from stages.config import Imported, Params
from stages.training import checkpoint, read_split, read_task, schedule, scorer


def main(params: Params, name: str) -> None:
    """The teacher of one task, and its targets."""
    task, tokenizer = read_task(name), load_tokenizer(BASE)
    imported = params.teacher.adapters.get(name)
    if imported:
        adapter, history, saved = read_imported(imported), History(), None
    else:
        adapter, history, saved = train_teacher(params, task, tokenizer)
    with whole_directory(teacher(name)) as scratch:
        write_adapter(scratch, adapter, str(BASE), plain_card(task, str(BASE)), torch.bfloat16)
        write_json(scratch / "history.json", history.to_json())
    # A fresh model: the targets come from the adapter as it was stored, in the dtype in which it was stored.
    model = load_model(BASE, torch.bfloat16)
    attach_adapter(model, read_plain_lora(teacher(name)), name)
    set_active(model, name)
    with whole_directory(targets(name)) as scratch:
        for split in ("train", "unlabelled"):
            examples = encode_all(task, tokenizer, read_split(name, split))
            if examples:
                write_targets(
                    scratch / split, model, task, tokenizer, examples,
                    params.train.eval_batch_size, params.teacher.top_k, f"{name}: targets of {split}",
                )  # fmt: skip
    if saved:
        saved.clear()


def train_teacher(params: Params, task: Task, tokenizer: Any) -> tuple[Adapter, History, Any]:
    """A LoRA trained on the labelled texts; the best one on validation."""
    model = load_model(BASE, torch.bfloat16, attention="eager")
    check_targets(model, params.teacher.targets, "teacher.targets")
    config = lora_config(params.teacher.rank, params.teacher.lora_alpha, params.teacher.targets)
    saved = checkpoint(params, "teacher", task.name, [fingerprint(BASE), params.teacher.model_dump_json()])
    adapter, history = finetune(
        model, config, encode_all(task, tokenizer, read_split(task.name, "train")),
        scorer(model, task, tokenizer, params),
        batch_size=params.train.batch_size, schedule=schedule(params), seed=params.seed,
        checkpoint=saved, title=f"{task.name}: teacher",
    )  # fmt: skip
    return adapter, history, saved


def read_imported(imported: Imported) -> Adapter:
    """The user's own adapter, recognised by its fingerprint."""
    folder = Path(imported.path)
    adapter = read_plain_lora(folder, "name a folder that PEFT wrote")
    found = fingerprint(folder)
    if found != imported.sha256:
        raise CaloraError(
            folder, f"weights with fingerprint {imported.sha256}", found, "put that into teacher.adapters"
        )
    return adapter


if __name__ == "__main__":
    run(main)
