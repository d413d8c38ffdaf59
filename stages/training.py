"""What the training stages share: the schedule, the validation score, the checkpoint's key."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

from calora.artifacts import read_json, sha256
from calora.evaluate import correct, predict
from calora.tasks import Task, encode_all, read_rows
from calora.training import Checkpoint, Schedule
from stages.common import CHECKPOINTS, data
from stages.config import Params


def schedule(params: Params) -> Schedule:
    """The schedule of every training."""
    t = params.train
    return Schedule(t.steps, t.lr, t.warmup, t.clip, t.eval_every, t.checkpoint_seconds)


def read_task(name: str) -> Task:
    """The task that the download stage wrote."""
    return Task.from_json(read_json(data(name) / "task.json", f"run `dvc repro download@{name}`"))


def read_split(name: str, split: str) -> list[dict[str, Any]]:
    """Rows of a split; only the unlabelled one may be empty."""
    path = data(name) / f"{split}.jsonl"
    if split == "unlabelled" and path.exists() and path.stat().st_size == 0:
        return []
    return read_rows(path, f"run `dvc repro download@{name}`")


def scorer(model: Any, task: Task, tokenizer: Any, params: Params) -> Callable[[], float]:
    """() -> accuracy on the validation split."""
    examples = encode_all(task, tokenizer, read_split(task.name, "validation"))

    def score() -> float:
        hits = correct(predict(model, task, tokenizer, examples, params.train.eval_batch_size), examples)
        return sum(hits) / len(hits)

    return score


def checkpoint(params: Params, *parts: str | Sequence[str]) -> Checkpoint:
    """The checkpoint of one training; its key covers all that the result depends on, so a stale one is never used.

    `parts` name the folder; the last one is a list of further inputs (fingerprints, parameters).
    """
    *path, inputs = parts
    task = str(path[1])
    digests = [sha256(file) for file in sorted(data(task).glob("*.json*"))]
    key = hashlib.sha256(repr((params.seed, params.train.model_dump_json(), digests, list(inputs))).encode())
    return Checkpoint(CHECKPOINTS.joinpath(*map(str, path)), key.hexdigest())
