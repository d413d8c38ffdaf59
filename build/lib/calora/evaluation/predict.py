"""Run a model over examples and return its answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from calora.common.batching import length_batches
from calora.common.parallel import gathered, portion
from calora.common.progress import progress
from calora.evaluation.metrics import counts_pairs, exact_match, items_of, value_of
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
    """Answer every example: by the most likely of its answers (scored), or by greedy generation.

    Answers that every row has, each of a single token, are compared by their logits at the prompt's last position; any
    others by the likelihood of all their tokens, as `task.likelihood` has it (`likelihoods`).

    Args:
        title: what the progress bar says; without one there is none.

    Raises:
        CaloraError: the answers cannot be told apart (`Task.answer_token_ids`), or the model cannot answer the task.
    """
    if not task.scored:
        family_of(model).answer_ids(model, task, tokenizer)
        prompts = [example.prompt_ids for example in examples]
        written = complete(model, tokenizer, prompts, task.max_new_tokens, batch_size, title=title)
        return Predictions([text.strip() for text in written], [-1] * len(examples))
    found = scores(model, task, tokenizer, examples, batch_size, title)
    labels = [int(own.argmax()) for own in found]
    return Predictions([e.choices[label].strip() for e, label in zip(examples, labels, strict=True)], labels)


def scores(
    model: PreTrainedModel,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    batch_size: int,
    title: str | None = None,
) -> list[Tensor]:
    """Of each example of a scored task the logits, or `likelihoods`, of its answers [k]: their softmax is how probable each is.

    Raises:
        CaloraError: as `predict`.
    """
    ids = family_of(model).answer_ids(model, task, tokenizer)
    if ids is None:
        return likelihoods(model, task, examples, batch_size, title)
    return _logits(model, examples, ids, batch_size, title)


def _logits(
    model: PreTrainedModel, examples: Sequence[Example], ids: Tensor, batch_size: int, title: str | None
) -> list[Tensor]:
    """The logits of `ids` [k] at the end of each prompt."""
    family, found = family_of(model), torch.zeros(len(examples), len(ids))
    batches = length_batches([len(e.prompt_ids) for e in examples], batch_size)
    with torch.no_grad():
        for indices in progress(batches, title, "batches"):
            batch = family.collate([Example(examples[i].prompt_ids) for i in indices], model)
            found[indices] = family.forward(model, batch, ids).logits.float().cpu()
    return list(found)


def likelihoods(
    model: PreTrainedModel, task: Task, examples: Sequence[Example], batch_size: int, title: str | None = None
) -> list[Tensor]:
    """Of each example, log p(answer | prompt) of each of its answers: the sum over the answer's tokens, or their mean.

    No end token counts, and each answer is read behind a prompt of its own.
    """
    family = family_of(model)
    pairs = [(i, Example(e.prompt_ids, ids)) for i, e in enumerate(examples) for ids in e.choice_ids]
    found = torch.zeros(len(pairs))
    batches = length_batches([e.tokens for _, e in pairs], batch_size)
    with torch.no_grad():
        for indices in progress(batches, title, "batches"):
            batch = family.collate([pairs[i][1] for i in indices], model)
            logits = family.forward(model, batch, None).logits.float()
            each = -F.cross_entropy(logits, batch.labels, reduction="none")
            rows = torch.zeros(len(indices), device=each.device).index_add(0, batch.positions[0], each)
            found[indices] = rows.cpu()
    if task.likelihood == "mean":
        found = found / torch.tensor([len(e.answer_ids) for _, e in pairs])
    return list(found.split([len(e.choice_ids) for e in examples]))


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    batch_size: int,
    title: str | None = None,
) -> list[str]:
    """What the model writes behind each prompt (token ids), greedily, up to an end token."""
    family, texts, ends = family_of(model), [""] * len(prompts), end_tokens(model)
    batches = length_batches([len(ids) for ids in prompts], batch_size)
    with torch.no_grad():
        for indices in progress(batches, title, "batches"):
            some = [Example(prompts[i]) for i in indices]
            written = family.generate(model, some, max_new_tokens, tokenizer.eos_token_id)
            for i, ids in zip(indices, written, strict=True):
                text = ids[:-1] if ids[-1] in ends else ids
                texts[i] = str(tokenizer.decode(text, skip_special_tokens=True))
    return texts


def correct(predictions: Predictions, examples: Sequence[Example]) -> list[bool]:
    """Whether each answer is right: the label, or an exact match with some reference (SQuAD's normalisation)."""
    return [
        label == example.label if example.label >= 0 else exact_match(answer, example.references)
        for answer, label, example in zip(predictions.answers, predictions.labels, examples, strict=True)
    ]


def measured(metric: str, task: Task, predictions: Predictions, examples: Sequence[Example]) -> list[float]:
    """What each item gives to a metric (`metrics.items_of`); where several processes each have a portion, of all of them."""
    return gathered(items_of(metric, task, predictions.labels, predictions.answers, examples))


def score(
    model: PreTrainedModel,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    batch_size: int,
) -> float:
    """The task's first metric; where several processes train together, each of them answers its portion."""
    mine, metric = portion(examples), task.metrics[0]
    items = measured(metric, task, predict(model, task, tokenizer, mine, batch_size), mine)
    return float(value_of(metric, counts_pairs(metric, task))(items))
