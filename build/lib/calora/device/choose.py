"""Which of a task's answers a row gets, and how probable each is, or what is written, from a runtime that only writes tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from calora.device.catalogue import Model
from calora.device.engine import Engine
from calora.device.runtime import ONLY
from calora.errors import CaloraError
from calora.evaluation.choice import Choice
from calora.models.tasks import Row, Task

PLAINLY = {"temperature": 1.0, "samplers": ["temperature"], "seed": 0, "n_predict": 1, "cache_prompt": True}
GREEDILY = {"temperature": 0.0, "cache_prompt": True}
WHOLE = "a"  # a character of which every tokenizer has a token
ALL = 2**31 - 1  # more tokens than any vocabulary has


def scored_task(model: Model) -> Task:
    """The task of a model that chooses among answers.

    Raises:
        CaloraError: it is the base, or its task writes its answers.
    """
    if model.task is None or not model.task.scored:
        found = "the base, which has no task" if model.task is None else "a task whose answers are written"
        raise CaloraError(
            f"model {model.name}",
            "an adapter of a classification task",
            found,
            "name an adapter as `task`, or ask for a completion",
        )
    return model.task


async def choose(engine: Engine, model: Model, row: Row, context: int, cached: bool = True) -> Choice:
    """The answer of highest likelihood, as `Task.likelihood` counts: p(answer) ~ exp(sum or mean of its log-probabilities).

    Args:
        row: with the columns of the prompt, and of the answers where they are the row's own.
        context: most tokens that a request may have.
        cached: whether what a slot has read before of the prompt may be used.

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
    found = None
    if all(len(ids) == 1 for ids in answers) and len(set(singles)) == len(singles):
        found = await _of_one_token(engine, model, prompt, singles, cached)
    if found is None:
        found = softmax(
            [
                await _likelihood(engine, model, task, prompt, ids, cached or number > 0)
                for number, ids in enumerate(answers)
            ]
        )
    return Choice.of(texts, found, len(prompt))


async def write(engine: Engine, model: Model, prompt: Sequence[int], tokens: int) -> str:
    """What is written behind a prompt, greedily.

    Args:
        tokens: the most that are written.
    """
    said = await engine.ask("/completion", {**GREEDILY, "prompt": list(prompt), "n_predict": tokens}, model.apply)
    return str(said["content"])


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


async def _of_one_token(
    engine: Engine, model: Model, prompt: Sequence[int], ids: Sequence[int], cached: bool
) -> list[float] | None:
    """One pass: the answers' logits are raised alike, so that what is left of the distribution is theirs; None where
    llama.cpp does not tell."""
    bias = [[token, ONLY] for token in ids]
    asked = {**PLAINLY, "prompt": list(prompt), "logit_bias": bias, "n_probs": len(ids), "post_sampling_probs": True}
    told = _of_first(await engine.ask("/completion", {**asked, "cache_prompt": cached}, model.apply))
    if told is None:
        return None
    found = {one["id"]: float(one["prob"]) for one in told["top_probs"]}
    total = sum(found.get(token, 0.0) for token in ids)
    return [found.get(token, 0.0) / total for token in ids]


async def _likelihood(
    engine: Engine, model: Model, task: Task, prompt: Sequence[int], ids: Sequence[int], cached: bool
) -> float:
    """A pass for each token of an answer; the one before is in the cache."""
    logs = [
        await _log_probability(engine, model, [*prompt, *ids[:place]], token, cached or place > 0)
        for place, token in enumerate(ids)
    ]
    return sum(logs) / (len(logs) if task.likelihood == "mean" else 1)


async def _log_probability(engine: Engine, model: Model, before: Sequence[int], token: int, cached: bool) -> float:
    """Of a token behind others, as it was before the bias."""
    asked = {**PLAINLY, "prompt": list(before), "cache_prompt": cached}
    body = {**asked, "logit_bias": [[token, ONLY]], "n_probs": 1}
    told = _of_first(await engine.ask("/completion", body, model.apply))
    if told is not None:
        return float(told["logprob"])
    whole = (await engine.tokenize(WHOLE, special=False))[0]  # beside which those of all tokens are told
    body = {**asked, "logit_bias": [[whole, ONLY]], "n_probs": ALL}
    told = _of_first(await engine.ask("/completion", body, model.apply))
    assert told is not None
    return next(float(one["logprob"]) for one in told["top_logprobs"] if one["id"] == token)


def _of_first(said: Mapping[str, Any]) -> dict[str, Any] | None:
    """What llama.cpp tells of the token that it has written; nothing of one that is a part of a character."""
    told: list[dict[str, Any]] = said.get("completion_probabilities") or []
    return told[0] if told else None


def softmax(values: Sequence[float]) -> list[float]:
    """exp(v) / sum exp(v)."""
    highest = max(values)
    powers = [math.exp(value - highest) for value in values]
    return [power / sum(powers) for power in powers]
