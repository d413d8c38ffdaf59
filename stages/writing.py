"""The texts that a teacher writes, and what it says of them."""

from __future__ import annotations

import json
import shutil
from collections import Counter

import torch
from transformers import PreTrainedTokenizerBase

from calora.adapters.teachers import attach_teacher
from calora.common.files import digest, write_text
from calora.common.parallel import place
from calora.distillation.targets import Targets, write_targets
from calora.distillation.written import write_rows
from calora.models.loading import load_model, load_tokenizer, training_attention
from calora.models.tasks import Task, encode_all, positions
from stages.common import BASE, teacher, written
from stages.config import Params
from stages.gathering import gathered
from stages.splits import TARGETS, WRITTEN, read_task


def write(params: Params, name: str, method: str) -> None:
    """texts.jsonl and targets/."""
    task, own, out = read_task(name), params.teacher.written, written(name, method)
    model, tokenizer = load_model(BASE, attention=training_attention()), load_tokenizer(BASE)
    place(model)
    if own.by == "teacher":
        attach_teacher(model, teacher(name), name)
    batch, top_k = params.train.eval_batch_size, params.teacher.top_k
    made_of = (
        params.seed,
        own.model_dump_json(),
        batch,
        top_k,
        str(model.dtype),
        task.to_json(),
        digest(BASE, teacher(name)),
    )
    with gathered(out, *made_of) as folder:
        rows = write_rows(
            folder / "batches", model, tokenizer, task, own.texts, temperature=own.temperature, tokens=own.tokens,
            seed=params.seed, batch_size=batch, lead=own.leads.get(name, ""), title=f"{name}: texts are written",
        )  # fmt: skip
        if own.by == "base":
            attach_teacher(model, teacher(name), name)
            place(model)
        examples, title = (
            encode_all(task, tokenizer, rows, positions(model.config)),
            f"{name}: targets of written texts",
        )
        write_targets(folder / TARGETS, model, task, tokenizer, examples, batch, top_k, title)
        shutil.rmtree(folder / "batches")
        write_text(folder / WRITTEN, "".join(json.dumps(row) + "\n" for row in rows))
        print(f"{name}: {len(rows)} texts written{answered(task, tokenizer, Targets(folder / TARGETS), len(rows))}")


def answered(task: Task, tokenizer: PreTrainedTokenizerBase, targets: Targets, count: int) -> str:
    """How often the teacher gives each answer, in words; nothing but for answers of one token, the same for all."""
    if task.answer_token_ids(tokenizer) is None:
        return ""
    shares = Counter(int(targets.read([i], torch.device("cpu")).logits.argmax()) for i in range(count))
    return ": " + ", ".join(f"{shares[i] / count:.2f} {answer.strip()}" for i, answer in enumerate(task.answers))
