"""What the training stages share: the schedule, the validation score, checkpoints, and the plain LoRA."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

import calora
from calora.adapters.cards import plain_card
from calora.adapters.folder import write_adapter
from calora.common.files import digest
from calora.common.parallel import only_first_goes_on
from calora.common.versions import FILE, versions
from calora.distillation.distill import finetune
from calora.distillation.training import Checkpoint, Schedule
from calora.evaluation.predict import score
from calora.models.tasks import Task, encode_all, positions
from stages.common import CHECKPOINTS, data
from stages.config import Params
from stages.splits import read_checked, read_split

Score = Callable[[], float]
CODE = (Path(calora.__file__).parent, Path(__file__).parent)


def schedule(params: Params) -> Schedule:
    """The schedule of every training."""
    t = params.train
    return Schedule(
        t.steps, t.lr, t.warmup, t.clip, t.eval_every, t.checkpoint_seconds, t.accumulation, t.gradient_checkpointing
    )


def scorer(model: Any, task: Task, tokenizer: Any, params: Params) -> Score:
    """() -> the task's first metric on the validation split."""
    examples = encode_all(task, tokenizer, read_checked(task.name, "validation"), positions(model.config))
    return lambda: score(model, task, tokenizer, examples, params.train.eval_batch_size)


def checkpoint(out: Path, key: str) -> Checkpoint:
    """Where the training that makes `out` saves itself; outside of what DVC removes when a stage starts."""
    return Checkpoint(CHECKPOINTS / out, key)


def run_key(params: Params, task: str, inputs: Sequence[Path], settings: object) -> str:
    """A digest of all that a training depends on: only the same one takes its checkpoint up.

    Code and libraries, data, seed and schedule, all files of the folders `inputs`, and `settings`.
    """
    files = [versions(), digest(*CODE, suffixes=(".py",)), digest(data(task)), digest(*inputs)]
    values = [params.seed, params.train.model_dump_json(), json.dumps(settings, sort_keys=True, default=sorted)]
    return hashlib.sha256(repr((files, values)).encode()).hexdigest()


def train_lora(
    params: Params, task: Task, model: Any, tokenizer: Any, config: LoraConfig, folder: Path, base: Path,
    dtype: torch.dtype = torch.bfloat16,
) -> None:  # fmt: skip
    """Train a fresh LoRA on the labelled texts and write it, with its curves, to `folder`.

    Args:
        dtype: of the stored tensors.
    """
    saved = checkpoint(folder, run_key(params, task.name, [base], (config.to_dict(), str(model.dtype))))
    examples = encode_all(task, tokenizer, read_split(task.name, "train"), positions(model.config))
    adapter, history = finetune(
        model, config, examples, scorer(model, task, tokenizer, params),
        batch_size=params.train.batch_size, schedule=schedule(params), seed=params.seed, checkpoint=saved, title=str(folder),
    )  # fmt: skip
    only_first_goes_on()
    notes = {"history.json": history.to_json(), FILE: versions()}
    write_adapter(folder, adapter, str(base), plain_card(task, str(base)), dtype, notes)
    saved.clear()
