"""Teacher targets: what the uncompressed model with its adapter says of each text, stored once, read by rows.

So the teacher is never in memory beside the student, and every change of compression, rank or alpha reuses them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from calora.common.batching import length_batches
from calora.common.files import check_tensors
from calora.common.progress import progress
from calora.common.tensors import write_tensors
from calora.errors import CaloraError
from calora.evaluation.predict import likelihoods
from calora.models.families import Batch, Output, family_of
from calora.models.tasks import Example, Task

MADE_BY = "make the teacher's targets again"
STORED = torch.bfloat16  # whatever the model computes in
SHARD_TOKENS = 2**14  # a shard is the most that an interrupted run has to do again


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
    model: PreTrainedModel,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    batch_size: int,
    top_k: int,
    title: str,
) -> None:
    """Run the teacher over `examples` and store its last hidden states and answer logits, in bfloat16.

    Where every row has the same answers, each of one token, their logits are kept; of any other answers the `top_k`
    highest at each of their tokens. Where such an answer is not known, the teacher's own stands in for it: the
    likeliest of the row's, or what it writes. Shards that an interrupted call with the same arguments left in
    `directory` are kept.
    """
    family = family_of(model)
    answer_ids = family.answer_ids(model, task, tokenizer)
    batches = length_batches([e.tokens for e in examples], batch_size)
    shard: dict[str, Tensor] = {}
    with torch.no_grad():
        for number, (indices, last) in enumerate(progress(_sharded(batches, examples), title, "batches", len(batches))):
            path = directory / f"targets-{last:05d}.safetensors"
            if path.exists():
                continue
            chosen = [examples[i] for i in indices]
            if answer_ids is None and not all(e.answer_ids for e in chosen):
                chosen = _with_own_answers(model, task, tokenizer, chosen)
            batch = family.collate(chosen, model)
            output = family.forward(model, batch, answer_ids)
            for index, example, target in zip(indices, chosen, _rows(batch, output, answer_ids, top_k), strict=True):
                shard |= {f"{index}.hidden.{stack}": hidden for stack, hidden in target.hidden.items()}
                shard |= {f"{index}.token_ids": target.token_ids, f"{index}.logits": target.logits}
                shard[f"{index}.answer_ids"] = torch.tensor(example.answer_ids, dtype=torch.long)
            if number == last:
                write_tensors(path, shard)
                shard = {}


def _sharded(batches: Sequence[list[int]], examples: Sequence[Example]) -> list[tuple[list[int], int]]:
    """Each batch with the number of the batch that ends its shard."""
    ends: list[int] = []
    held = 0
    for number, indices in enumerate(batches):
        held += sum(examples[i].tokens for i in indices)
        if held >= SHARD_TOKENS or number == len(batches) - 1:
            ends += [number] * (number + 1 - len(ends))
            held = 0
    return list(zip(batches, ends, strict=True))


def _with_own_answers(
    model: PreTrainedModel, task: Task, tokenizer: PreTrainedTokenizerBase, examples: list[Example]
) -> list[Example]:
    """The examples; where one has no answer with the model's: the likeliest of its own, or a written one with its end token."""
    asked = [e for e in examples if not e.answer_ids]
    if task.scored:
        best = (int(scores.argmax()) for scores in likelihoods(model, task, asked, len(asked)))
        answers = iter([e.choice_ids[place] for e, place in zip(asked, best, strict=True)])
    else:
        prompts = [Example(e.prompt_ids) for e in asked]
        answers = iter(family_of(model).generate(model, prompts, task.max_new_tokens, tokenizer.eos_token_id))
    return [e if e.answer_ids else replace(e, answer_ids=next(answers)) for e in examples]


def _rows(batch: Batch, output: Output, answer_ids: Tensor | None, top_k: int) -> list[Target]:
    rows = batch.positions[0]
    logits = output.logits
    if answer_ids is None:
        logits, token_ids = logits.topk(min(top_k, logits.shape[-1]))
    else:
        token_ids = answer_ids.expand(len(logits), -1)
    logits, states = logits.to(STORED), {stack: hidden.to(STORED) for stack, hidden in output.hidden.items()}
    targets = []
    for row in range(int(rows[-1]) + 1):
        hidden = {stack: states[stack][row, mask[row]].clone() for stack, mask in batch.masks.items()}
        targets.append(Target(hidden, token_ids[rows == row].clone(), logits[rows == row].clone()))
    return targets


class Targets:
    """Stored targets, read from disk a batch at a time."""

    def __init__(self, directory: Path) -> None:
        paths = sorted(directory.glob("targets-*.safetensors")) or [directory / "targets-00000.safetensors"]
        self.rows: dict[int, tuple[Any, int]] = {}  # text -> its file, and its number there
        names: set[str] = set()
        for path in paths:
            check_tensors(path, MADE_BY)
            file = safe_open(path, framework="pt")
            for name in file.keys():  # type: ignore[no-untyped-call]  # noqa: SIM118  (not a dict)
                index, _, kind = name.partition(".")
                self.rows[int(index)] = (file, int(index))
                names.add(kind)
        self.stacks = sorted(name.removeprefix("hidden.") for name in names if name.startswith("hidden."))

    def take(self, places: Sequence[int]) -> Targets:
        """Those of some texts: text i of the result is text `places[i]` here."""
        taken = copy.copy(self)
        taken.rows = {i: self.rows[place] for i, place in enumerate(places)}
        return taken

    def followed_by(self, other: Targets) -> Targets:
        """These, and then those of the texts of another pool."""
        both = copy.copy(self)
        both.rows = self.rows | {len(self.rows) + i: row for i, row in other.rows.items()}
        return both

    def with_answers(self, examples: Sequence[Example]) -> list[Example]:
        """The examples with the answers that the targets are about (the teacher's own where none was known).

        Raises:
            CaloraError: the targets were made from another number of examples.
        """
        if self.rows.keys() != set(range(len(examples))):
            raise CaloraError("teacher targets", len(examples), len(self.rows), MADE_BY)
        return [
            example if example.answer_ids else replace(example, answer_ids=self._tensor(index, "answer_ids").tolist())
            for index, example in enumerate(examples)
        ]

    def read(self, indices: Sequence[int], device: torch.device) -> Target:
        """The targets of a batch, rows in the order of `indices`."""

        def rows(kind: str) -> Tensor:
            return torch.cat([self._tensor(i, kind) for i in indices]).to(device)

        hidden = {stack: rows(f"hidden.{stack}") for stack in self.stacks}
        token_ids, logits = rows("token_ids"), rows("logits")
        return Target(hidden, token_ids, logits)

    def _tensor(self, index: int, kind: str) -> Tensor:
        file, number = self.rows[index]
        tensor: Tensor = file.get_tensor(f"{number}.{kind}")
        return tensor
