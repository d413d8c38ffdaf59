"""Which of a task's answers a row gets, and how probable each is, from a runtime that only writes tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from calora.device.catalogue import Model
from calora.device.engine import Engine
from calora.device.runtime import ONLY
from calora.errors import CaloraError
from calora.models.tasks import Row, Task

PLAINLY = {"temperature": 1.0, "samplers": ["temperature"], "seed": 0, "n_predict": 1, "cache_prompt": True}


@dataclass(frozen=True)
class Choice:
    """An answer to a row.

    Args:
        answer: the most probable one.
        probabilities: of each answer of the row, among these; their sum is 1.
        answers: of the row, in label order.
        tokens: of the prompt.
    """

    answer: str
    probabilities: list[float]
    answers: list[str]
    tokens: int


def scored_task(model: Model) -> Task:
    """The task of a model that chooses among answers.

    Raises:
        CaloraError: it is the base, or its task writes its answers.
    """
    if model.task is None or not model.task.scored:
        found = "the base, which has no task" if model.task is None else "a task whose answers are written"
        raise CaloraError(f"model {model.name}", "an adapter of a classification task", found, "ask for a completion")
    return model.task


def columns_of(task: Task) -> list[str]:
    """The columns of a row: those of the prompt, and of the answers."""
    return list(dict.fromkeys([*task.columns, *task.answer_columns]))


def as_row(task: Task, given: str | Row) -> Row:
    """A text stands for a row whose prompt has one column; raises `CaloraError` where there are more."""
    if not isinstance(given, str):
        return given
    columns = columns_of(task)
    if len(columns) > 1:
        raise CaloraError(f"input of task {task.name}", f"objects with {', '.join(columns)}", "a text", "send objects")
    return {columns[0]: given}


async def choose(engine: Engine, model: Model, row: Row, context: int) -> Choice:
    """The answer of highest likelihood, as `Task.likelihood` counts: p(answer) ~ exp(sum or mean of its log-probabilities).

    Args:
        row: with the columns of the prompt, and of the answers where they are the row's own.
        context: most tokens that a request may have.

    Raises:
        CaloraError: the model has no such task, or the row lacks a column.
    """
    task = scored_task(model)
    texts = task.choices(row)
    answers = [await engine.tokenize(text, special=False) for text in texts]
    if not all(answers):
        raise CaloraError(f"answers of task {task.name}", "at least one token each", list(texts), "correct them")
    longest = min(task.max_tokens, context - max(map(len, answers)))
    prompt = await prompt_ids(engine, task.render(row), longest)
    singles = [ids[0] for ids in answers]
    if all(len(ids) == 1 for ids in answers) and len(set(singles)) == len(singles):
        found = await _of_one_token(engine, model, prompt, singles)
    else:
        found = softmax([await _likelihood(engine, model, task, prompt, ids) for ids in answers])
    best = max(range(len(found)), key=found.__getitem__)
    return Choice(texts[best].strip(), found, [text.strip() for text in texts], len(prompt))


async def prompt_ids(engine: Engine, text: str, longest: int) -> list[int]:
    """Token ids of a prompt; of a longer one the end of the text is kept, and what the tokenizer puts around it, as `Task` does."""
    ids = await engine.tokenize(text)
    if len(ids) <= longest:
        return ids
    bare = await engine.tokenize(text, special=False)
    around = len(ids) - len(bare)
    first = next((place for place in range(around + 1) if ids[place : place + len(bare)] == bare), 0)
    room = longest - around
    if room < 1:
        raise CaloraError("context", f"room for more than {around} tokens", longest, "raise --context")
    return [*ids[:first], *bare[-room:], *ids[first + len(bare) :]]


async def _of_one_token(engine: Engine, model: Model, prompt: Sequence[int], ids: Sequence[int]) -> list[float]:
    """One pass: the answers' logits are raised alike, so that what is left of the distribution is theirs."""
    bias = [[token, ONLY] for token in ids]
    asked = {**PLAINLY, "prompt": list(prompt), "logit_bias": bias, "n_probs": len(ids), "post_sampling_probs": True}
    said = await engine.ask("/completion", asked, model.apply)
    found = {one["id"]: float(one["prob"]) for one in _of_first(said)["top_probs"]}
    total = sum(found.get(token, 0.0) for token in ids)
    return [found.get(token, 0.0) / total for token in ids]


async def _likelihood(engine: Engine, model: Model, task: Task, prompt: Sequence[int], ids: Sequence[int]) -> float:
    """A pass for each token of an answer; the one before is in the cache."""
    logs = []
    for place, token in enumerate(ids):
        asked = {"prompt": [*prompt, *ids[:place]], "logit_bias": [[token, ONLY]], "n_probs": 1}
        said = await engine.ask("/completion", {**PLAINLY, **asked}, model.apply)
        logs.append(float(_of_first(said)["logprob"]))  # before the bias
    return sum(logs) / (len(logs) if task.likelihood == "mean" else 1)


def _of_first(said: Mapping[str, Any]) -> dict[str, Any]:
    """What llama.cpp tells of the first token; of half a character it tells nothing."""
    told: list[dict[str, Any]] = said.get("completion_probabilities") or []
    if not told:
        fix = "choose other answers, or `calora.load`"
        raise CaloraError("an answer", "tokens of whole characters", "a part of one", fix)
    return told[0]


def softmax(values: Sequence[float]) -> list[float]:
    """exp(v) / sum exp(v)."""
    highest = max(values)
    powers = [math.exp(value - highest) for value in values]
    return [power / sum(powers) for power in powers]
