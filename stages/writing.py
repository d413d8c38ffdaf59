"""The texts that a teacher writes, and what it says of them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

import calora
from calora.adapters.teachers import attach_teacher
from calora.common.files import digest, replace_directory, write_json, write_text
from calora.common.parallel import place
from calora.common.versions import FILE, versions
from calora.distillation.targets import Targets, write_targets
from calora.distillation.written import write_rows
from calora.models.loading import load_model, load_tokenizer, training_attention
from calora.models.tasks import Task, encode_all, positions
from stages.common import BASE, CHECKPOINTS, teacher, written
from stages.config import Params
from stages.splits import TARGETS, WRITTEN, read_task

CODE = Path(calora.__file__).parent


def write(params: Params, name: str, method: str) -> None:
    """texts.jsonl and targets/; gathered where DVC removes nothing, so that an interrupted run goes on."""
    task, own, out = read_task(name), params.teacher.written, written(name, method)
    model, tokenizer = load_model(BASE, attention=training_attention()), load_tokenizer(BASE)
    place(model)
    if own.by == "teacher":
        attach_teacher(model, teacher(name), name)
    batch, folders = params.train.eval_batch_size, digest(BASE, teacher(name))
    settings = (params.seed, own.model_dump_json(), batch, params.teacher.top_k, str(model.dtype))
    key = repr((versions(), digest(CODE, suffixes=(".py",)), folders, task.to_json(), settings))
    unfinished = CHECKPOINTS / out / hashlib.sha256(key.encode()).hexdigest()
    rows = write_rows(
        unfinished / "batches", model, tokenizer, task, own.texts, temperature=own.temperature, tokens=own.tokens,
        seed=params.seed, batch_size=batch, lead=own.leads.get(name, ""), title=f"{name}: texts are written",
    )  # fmt: skip
    if own.by == "base":
        attach_teacher(model, teacher(name), name)
        place(model)
    examples = encode_all(task, tokenizer, rows, positions(model.config))
    write_targets(
        unfinished / TARGETS, model, task, tokenizer, examples, batch, params.teacher.top_k,
        f"{name}: targets of written texts",
    )  # fmt: skip
    shutil.rmtree(unfinished / "batches")
    write_text(unfinished / WRITTEN, "".join(json.dumps(row) + "\n" for row in rows))
    write_json(unfinished / FILE, versions())
    print(f"{name}: {len(rows)} texts written{answered(task, tokenizer, Targets(unfinished / TARGETS), len(rows))}")
    replace_directory(unfinished, out)
    shutil.rmtree(CHECKPOINTS / out)  # with what an earlier, abandoned run left there


def answered(task: Task, tokenizer: PreTrainedTokenizerBase, targets: Targets, count: int) -> str:
    """How often the teacher gives each answer, in words; nothing but for answers of one token, the same for all."""
    if task.answer_token_ids(tokenizer) is None:
        return ""
    shares = Counter(int(targets.read([i], torch.device("cpu")).logits.argmax()) for i in range(count))
    return ": " + ", ".join(f"{shares[i] / count:.2f} {answer.strip()}" for i, answer in enumerate(task.answers))
