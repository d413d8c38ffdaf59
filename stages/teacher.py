"""Train (or import) the LoRA on the uncompressed LLM and store its outputs for every training text.

Reads models/base, data/<task>; writes models/teacher/<task> (a plain PEFT LoRA) and models/targets/<task>.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from calora.adapters.cards import plain_card
from calora.adapters.folder import read_plain_lora, write_adapter
from calora.adapters.foreign import import_lora
from calora.adapters.lora import attach_adapter, check_targets, lora_config, set_active
from calora.common.artifacts import fingerprint, replace_directory
from calora.common.parallel import place
from calora.distillation.targets import write_targets
from calora.distillation.training import Checkpoint
from calora.errors import CaloraError
from calora.models.loading import load_model, load_tokenizer
from calora.models.tasks import Task, encode_all
from stages.common import BASE, CHECKPOINTS, run, targets, teacher
from stages.config import Imported, Params
from stages.splits import read_split, read_task
from stages.training import run_key, train_lora


def main(params: Params, name: str) -> None:
    """The teacher of one task, and its targets."""
    task = read_task(name)
    imported = params.teacher.adapters.get(name)
    saved = take_imported(task, imported) if imported else train_teacher(params, task)
    store_targets(params, task)
    if saved:
        saved.clear()


def train_teacher(params: Params, task: Task) -> Checkpoint:
    """A LoRA trained on the labelled texts; the best one on validation."""
    model = load_model(BASE, torch.bfloat16, attention="eager")
    check_targets(model, params.teacher.targets, params.teacher.rank)
    config = lora_config(params.teacher.rank, params.teacher.lora_alpha, params.teacher.targets)
    folder = teacher(task.name)
    return train_lora(params, task, model, load_tokenizer(BASE), config, folder, BASE, fingerprint(BASE))


def take_imported(task: Task, imported: Imported) -> None:
    """The user's own adapter, recognised by its fingerprint, as a plain LoRA of the base."""
    folder = Path(imported.path)
    found = fingerprint(folder)
    if found != imported.sha256:
        raise CaloraError(
            folder, f"weights with fingerprint {imported.sha256}", found, "put that into teacher.adapters"
        )
    adapter = import_lora(folder, load_model(BASE, torch.bfloat16))
    write_adapter(teacher(task.name), adapter, str(BASE), plain_card(task, str(BASE)), torch.bfloat16)


def store_targets(params: Params, task: Task) -> None:
    """The teacher's outputs, from the adapter as it was stored and in the dtype in which it was stored.

    They are gathered where DVC removes nothing, so that an interrupted run goes on from its last shard.
    """
    model, tokenizer = load_model(BASE, torch.bfloat16, attention="eager"), load_tokenizer(BASE)
    attach_adapter(model, read_plain_lora(teacher(task.name)), task.name)
    set_active(model, task.name)
    place(model)
    key = run_key(params, task.name, fingerprint(BASE), fingerprint(teacher(task.name)), params.teacher.top_k)
    unfinished = CHECKPOINTS / targets(task.name) / key
    for split in ("train", "unlabelled"):
        examples = encode_all(task, tokenizer, read_split(task.name, split))
        if examples:
            write_targets(
                unfinished / split, model, task, tokenizer, examples,
                params.train.eval_batch_size, params.teacher.top_k, f"{task.name}: targets of {split}",
            )  # fmt: skip
    replace_directory(unfinished, targets(task.name))
    shutil.rmtree(CHECKPOINTS / targets(task.name))  # with what an earlier, abandoned run left there


if __name__ == "__main__":
    run(main, trains=True)
