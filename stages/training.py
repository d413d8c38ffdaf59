"""What the training stages share: the schedule, the validation score, checkpoints, and the plain LoRA."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig

from calora.adapters.cards import plain_card
from calora.adapters.folder import write_adapter
from calora.common.artifacts import sha256
from calora.common.parallel import only_first_goes_on
from calora.distillation.distill import finetune
from calora.distillation.training import Checkpoint, Schedule
from calora.evaluation.predict import accuracy
from calora.models.tasks import Task, encode_all
from stages.common import CHECKPOINTS, data
from stages.config import Params
from stages.splits import read_split


def schedule(params: Params) -> Schedule:
    """The schedule of every training."""
    t = params.train
    return Schedule(t.steps, t.lr, t.warmup, t.clip, t.eval_every, t.checkpoint_seconds)


def scorer(model: Any, task: Task, tokenizer: Any, params: Params) -> Callable[[], float]:
    """() -> accuracy on the validation split."""
    examples = encode_all(task, tokenizer, read_split(task.name, "validation"))
    return lambda: accuracy(model, task, tokenizer, examples, params.train.eval_batch_size)


def run_key(params: Params, task: str, *inputs: object) -> str:
    """A digest of all that a training depends on: its data, seed and schedule, and `inputs` (fingerprints, parameters)."""
    digests = [sha256(file) for file in sorted(data(task).glob("*.json*"))]
    return hashlib.sha256(repr((params.seed, params.train.model_dump_json(), digests, inputs)).encode()).hexdigest()


def checkpoint(folder: Path, key: str) -> Checkpoint:
    """Where the training of the adapter in `folder` saves itself; outside of what DVC removes when a stage starts."""
    return Checkpoint(CHECKPOINTS / folder, key)


def train_lora(
    params: Params,
    task: Task,
    model: Any,
    tokenizer: Any,
    config: LoraConfig,
    folder: Path,
    base: Path,
    base_fingerprint: str,
    meta: Mapping[str, object] | None = None,
) -> Checkpoint:
    """Train a fresh LoRA on the labelled texts and write it, with its curves, to `folder`.

    Returns:
        The checkpoint of the finished training, for the caller to clear when its stage is done.
    """
    described = json.dumps(config.to_dict(), sort_keys=True, default=sorted)  # PEFT's targets are a set
    saved = checkpoint(folder, run_key(params, task.name, base_fingerprint, described))
    adapter, history = finetune(
        model, config, encode_all(task, tokenizer, read_split(task.name, "train")), scorer(model, task, tokenizer, params),
        batch_size=params.train.batch_size, schedule=schedule(params), seed=params.seed, checkpoint=saved, title=str(folder),
    )  # fmt: skip
    only_first_goes_on()
    adapter.meta = dict(meta or {})
    card = plain_card(task, str(base))
    write_adapter(folder, adapter, str(base), card, model.dtype, {"history.json": history.to_json()})
    return saved
