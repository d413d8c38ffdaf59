"""Train (or import) the LoRA on the uncompressed LLM and store its outputs for every training text.

Reads models/base, models/brought/<task>, data/<task>; writes models/teacher/<task> (a plain PEFT LoRA) and models/targets/<task>.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from calora.adapters.cards import plain_card
from calora.adapters.folder import CONFIG, read_plain_lora, write_adapter
from calora.adapters.foreign import import_lora
from calora.adapters.lora import attach_adapter, check_targets, lora_config, set_active
from calora.common.files import replace_directory, write_json
from calora.common.parallel import only_first_goes_on, place
from calora.common.versions import FILE, versions
from calora.distillation.targets import write_targets
from calora.distillation.training import Checkpoint
from calora.models.anatomy import named
from calora.models.loading import load_model, load_tokenizer, training_attention
from calora.models.tasks import Task, encode_all, positions
from calora.models.uniform import was_conv1d
from stages.common import BASE, CHECKPOINTS, brought, run, targets, teacher
from stages.config import Params
from stages.splits import read_split, read_task
from stages.training import run_key, train_lora


def main(params: Params, name: str) -> None:
    """The teacher of one task, and its targets."""
    task, theirs = read_task(name), brought(name)
    model = load_model(BASE, attention=training_attention())
    saved = None
    if (theirs / CONFIG).exists():
        take_imported(task, theirs, model)
    else:
        saved = train_teacher(params, task, model)
    store_targets(params, task)
    if saved:
        saved.clear()


def train_teacher(params: Params, task: Task, model: Any) -> Checkpoint:
    """A LoRA trained on the labelled texts; the best one on validation."""
    check_targets(model, params.teacher.targets, params.teacher.rank)
    names = named(model, params.teacher.targets)
    config = as_peft_has_it(lora_config(params.teacher.rank, params.teacher.lora_alpha, names), model)
    return train_lora(params, task, model, load_tokenizer(BASE), config, teacher(task.name), BASE)


def as_peft_has_it(config: Any, model: Any) -> Any:
    """The configuration of a LoRA that PEFT puts on the base itself, whose layers may be Conv1D (GPT-2)."""
    config.fan_in_fan_out = bool(was_conv1d(model))
    return config


def take_imported(task: Task, theirs: Path, model: Any) -> None:
    """The user's own adapter, checked against the base and converted where it can be."""
    only_first_goes_on()
    adapter = import_lora(theirs, model)
    as_peft_has_it(adapter.config, model)
    card, notes = plain_card(task, str(BASE)), {FILE: versions()}
    write_adapter(teacher(task.name), adapter, str(BASE), card, torch.bfloat16, notes)


def store_targets(params: Params, task: Task) -> None:
    """The teacher's outputs, from the adapter as it was stored and in the dtype in which it was stored.

    They are gathered where DVC removes nothing, so that an interrupted run goes on from its last shard.
    """
    model, tokenizer = load_model(BASE, attention=training_attention()), load_tokenizer(BASE)
    attach_adapter(model, read_plain_lora(teacher(task.name)), task.name)
    set_active(model, task.name)
    place(model)
    key = run_key(params, task.name, [BASE, teacher(task.name)], (params.teacher.top_k, str(model.dtype)))
    unfinished = CHECKPOINTS / targets(task.name) / key
    for split in ("train", "unlabelled"):
        examples = encode_all(task, tokenizer, read_split(task.name, split), positions(model.config))
        if examples:
            write_targets(
                unfinished / split, model, task, tokenizer, examples,
                params.train.eval_batch_size, params.teacher.top_k, f"{task.name}: targets of {split}",
            )  # fmt: skip
    write_json(unfinished / FILE, versions())
    replace_directory(unfinished, targets(task.name))
    shutil.rmtree(CHECKPOINTS / targets(task.name))  # with what an earlier, abandoned run left there


if __name__ == "__main__":
    run(main, trains=True)
