"""Run a model over examples and return its answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from calora.common.batching import length_batches
from calora.common.parallel import portion, total
from calora.common.progress import progress
from calora.evaluation.metrics import exact_match
from calora.models.families import end_tokens, family_of
from calora.models.tasks import Example, Task


@dataclass(frozen=True)
class Predictions:
    """`answers` in the order of the examples; `labels` are their indices (scored tasks), -1 for generated ones."""

    answers: list[str]
    labels: list[int]


def predict(
    model: PreTrainedModel,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    batch_size: int,
    title: str | None = None,
) -> Predictions:
    """Answer every example: by the highest answer logit (scored), or by greedy generation.

    Args:
        title: what the progress bar says; without one there is none.
    """
    family = family_of(model)
    answers, labels, ends = [""] * len(examples), [-1] * len(examples), end_tokens(model)
    scored_ids = family.answer_ids(model, task, tokenizer)
    batches = length_batches([len(e.prompt_ids) for e in examples], batch_size)
    with torch.no_grad():
        for indices in progress(batches, title, "batches"):
            prompts = [Example(examples[i].prompt_ids) for i in indices]
            if task.scored:
                output = family.forward(model, family.collate(prompts, model), scored_ids)
                for i, label in zip(indices, output.logits.float().argmax(-1).tolist(), strict=True):
                    labels[i], answers[i] = label, task.answers[label].strip()
            else:
                written = family.generate(model, prompts, task.max_new_tokens, tokenizer.eos_token_id)
                for i, ids in zip(indices, written, strict=True):
                    text = ids[:-1] if ids[-1] in ends else ids
                    answers[i] = str(tokenizer.decode(text, skip_special_tokens=True)).strip()
    return Predictions(answers, labels)


def correct(predictions: Predictions, examples: Sequence[Example]) -> list[bool]:
    """Whether each answer is right: the label, or an exact match with some reference (SQuAD's normalisation)."""
    return [
        label == example.label if example.label >= 0 else exact_match(answer, example.references)
        for answer, label, example in zip(predictions.answers, predictions.labels, examples, strict=True)
    ]


def accuracy(
    model: PreTrainedModel,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    batch_size: int,
) -> float:
    """Share of right answers; where several processes train together, each of them answers its portion."""
    mine = portion(examples)
    hits = correct(predict(model, task, tokenizer, mine, batch_size), mine)
    return total(sum(hits)) / len(examples)
