"""Teacher targets: what the uncompressed model with its adapter says of each text, stored once, read by rows.

So the teacher is never in memory beside the student, and every change of compression, rank or alpha reuses them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from calora.artifacts import check_tensors, read_json, write_json, write_tensors
from calora.batching import length_batches
from calora.errors import CaloraError
from calora.models import Batch, Output, family_of
from calora.tasks import Example, Task

SHARD_BYTES = 2**26
INDEX = "targets.json"


@dataclass(frozen=True)
class Target:
    """The teacher's outputs for one batch.

    Args:
        hidden: stack -> last hidden states of the real tokens [N, H], in row order.
        token_ids: the tokens that the teacher's logits are about, [P, k].
        logits: [P, k].
    """

    hidden: dict[str, Tensor]
    token_ids: Tensor
    logits: Tensor


def write_targets(
    directory: Path,
    model: Any,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    batch_size: int,
    top_k: int,
    title: str,
) -> None:
    """Run the teacher over `examples` and store its last hidden states and answer logits, in the model's dtype.

    Scored tasks keep the logits of the candidate answers; generated ones the `top_k` highest. Where a generated
    example has no answer, the teacher's own greedy answer stands in for it.
    """
    family = family_of(model)
    answer_ids = torch.tensor(task.answer_token_ids(tokenizer)) if task.scored else None
    place: list[tuple[int, int]] = [(-1, -1)] * len(examples)
    answers: list[list[int]] = [[]] * len(examples)
    shard: dict[str, Tensor] = {}
    number, held = 0, 0
    batches = length_batches([e.tokens for e in examples], batch_size)
    with torch.no_grad():
        for indices in tqdm(batches, desc=title, unit="batch", disable=None):
            batch_examples = [examples[i] for i in indices]
            if not task.scored and not all(e.answer_ids for e in batch_examples):
                batch_examples = _with_own_answers(model, task, tokenizer, batch_examples)
            batch = family.collate(batch_examples, model)
            output = family.forward(model, batch, answer_ids)
            for row, (index, target) in enumerate(zip(indices, _rows(batch, output, answer_ids, top_k), strict=True)):
                place[index], answers[index] = (number, row_count(shard)), batch_examples[row].answer_ids
                prefix = row_count(shard)
                for stack, hidden in target.hidden.items():
                    shard[f"{prefix}.hidden.{stack}"] = hidden
                shard[f"{prefix}.logits"], shard[f"{prefix}.token_ids"] = target.logits, target.token_ids
                held += sum(t.nbytes for t in target.hidden.values())
            if held >= SHARD_BYTES:
                write_tensors(directory / f"targets-{number:05d}.safetensors", shard)
                shard, held, number = {}, 0, number + 1
    if shard:
        write_tensors(directory / f"targets-{number:05d}.safetensors", shard)
    write_json(directory / INDEX, {"place": place, "answers": answers, "tokens": [e.tokens for e in examples]})


def row_count(shard: dict[str, Tensor]) -> int:
    """Examples in a shard so far."""
    return sum(name.endswith(".logits") for name in shard)


def _with_own_answers(
    model: Any, task: Task, tokenizer: PreTrainedTokenizerBase, examples: list[Example]
) -> list[Example]:
    written = family_of(model).generate(model, [Example(e.prompt_ids) for e in examples], task.max_new_tokens)
    end = tokenizer.eos_token_id
    completed = []
    for example, ids in zip(examples, written, strict=True):
        ids = [*ids[: ids.index(end)], end] if end in ids else ids
        completed.append(example if example.answer_ids else Example(example.prompt_ids, ids))
    return completed


def _rows(batch: Batch, output: Output, answer_ids: Tensor | None, top_k: int) -> list[Target]:
    rows = batch.positions[0]
    logits = output.logits
    if answer_ids is None:
        logits, token_ids = logits.topk(min(top_k, logits.shape[-1]))
    else:
        token_ids = answer_ids.expand(len(logits), -1)
    targets = []
    for row in range(int(rows[-1]) + 1):
        hidden = {stack: output.hidden[stack][row, mask[row]].clone() for stack, mask in batch.masks.items()}
        targets.append(Target(hidden, token_ids[rows == row].clone(), logits[rows == row].clone()))
    return targets


class Targets:
    """Stored targets, read from disk a batch at a time."""

    def __init__(self, directory: Path) -> None:
        made_by = "run `dvc repro` to make the teacher's targets"
        index = read_json(directory / INDEX, made_by)
        self.place: list[tuple[int, int]] = index["place"]
        self.answers: list[list[int]] = index["answers"]
        self.tokens: list[int] = index["tokens"]
        shards = {shard for shard, _ in self.place}
        paths = [directory / f"targets-{shard:05d}.safetensors" for shard in sorted(shards)]
        for path in paths:
            check_tensors(path, made_by)
        self.files: list[Any] = [safe_open(path, framework="pt") for path in paths]
        self.stacks = tuple(
            sorted({name.split(".")[-1] for name in self.files[0].keys() if ".hidden." in name})  # noqa: SIM118
        )

    def check(self, examples: Sequence[Example], where: str) -> None:
        """Raise unless the targets were made from exactly these examples' lengths."""
        if len(examples) != len(self.place):
            raise CaloraError(where, f"{len(examples)} targets", len(self.place), "run `dvc repro` from teacher on")

    def with_answers(self, examples: Sequence[Example]) -> list[Example]:
        """The examples with the answers that the targets were computed for (the teacher's own where none was known)."""
        return [
            example if example.answer_ids or not answer else Example(example.prompt_ids, answer)
            for example, answer in zip(examples, self.answers, strict=True)
        ]

    def read(self, indices: Sequence[int]) -> Target:
        """The targets of a batch, rows in the order of `indices`."""
        rows = [(self.files[self.place[i][0]], self.place[i][1]) for i in indices]
        hidden = {s: torch.cat([f.get_tensor(f"{r}.hidden.{s}") for f, r in rows]) for s in self.stacks}
        token_ids, logits = (torch.cat([f.get_tensor(f"{r}.{n}") for f, r in rows]) for n in ("token_ids", "logits"))
        return Target(hidden, token_ids, logits)
