"""Texts that the teacher writes itself, for whoever has none: sampled through the task's prompt, column by column.

Distilling from them needs neither a label nor a text (after arXiv 2510.08600 and 2606.04238).
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from pathlib import Path
from string import Formatter
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from calora.common.files import write_text
from calora.common.progress import progress
from calora.errors import CaloraError
from calora.models.families import end_tokens, pad, pad_token
from calora.models.tasks import Task

PATIENCE = 4  # times the texts that are wanted, before it is given up
Row = dict[str, str]


def write_rows(
    directory: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    count: int,
    *,
    temperature: float,
    tokens: int,
    seed: int,
    batch_size: int,
    title: str | None,
    lead: str = "",
) -> list[Row]:
    """Let the teacher write `count` rows of the prompt's columns, no two alike.

    The prompt up to a column is what the model goes on from; the column ends where the prompt goes on. Batches that an
    interrupted call with the same arguments left in `directory` are kept: each has a seed of its own.

    Args:
        model: the uncompressed base with the adapter, in use; decoder-only.
        temperature: > 0; 1 samples what the model says, of the whole vocabulary.
        tokens: longest text of a column, >= 1.
        lead: words in front of the prompt while it is written, such as what the texts are; no part of a row.

    Raises:
        CaloraError: the model writes no texts, or too few different ones.
    """
    if model.config.is_encoder_decoder:
        fix = "give unlabelled texts of the task instead"
        raise CaloraError(
            "texts: written", "a decoder-only base, which goes on from a prompt", "an encoder-decoder", fix
        )
    found: dict[tuple[str, ...], Row] = {}
    needed = math.ceil(count / batch_size)
    for number in progress(range(PATIENCE * needed + 1), title, "batches", needed):
        file = directory / f"texts-{number:05d}.json"
        if not file.exists():
            with torch.random.fork_rng():
                torch.manual_seed(seed * 2**20 + number)
                rows = _batch(model, tokenizer, task, batch_size, temperature, tokens, lead)
            write_text(file, json.dumps(rows))
        for row in json.loads(file.read_text(encoding="utf-8")):
            if all(row.values()):
                found.setdefault(tuple(" ".join(text.lower().split()) for text in row.values()), row)
        if len(found) >= count:
            return list(found.values())[:count]
    fix = "raise the temperature, or ask for fewer"
    raise CaloraError("texts: written", f"{count} texts that differ", len(found), fix)


def _batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    size: int,
    temperature: float,
    tokens: int,
    lead: str,
) -> list[Row]:
    """As many rows, some of them perhaps empty."""
    parts = [(literal, column) for literal, column, _, _ in Formatter().parse(task.prompt)]
    rows: list[Row] = [{} for _ in range(size)]
    prompts = [lead] * size
    for (literal, column), (after, _) in zip(parts, [*parts[1:], ("", None)], strict=True):
        prompts = [prompt + literal for prompt in prompts]
        if not column:
            continue
        if column not in rows[0]:
            stop = "\n" if after.startswith("\n") else after.strip()
            for row, text in zip(rows, _continued(model, tokenizer, prompts, stop, temperature, tokens), strict=True):
                row[column] = text
        prompts = [prompt + row[column] for prompt, row in zip(prompts, rows, strict=True)]
    return rows


def _continued(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    stop: str,
    temperature: float,
    tokens: int,
) -> list[str]:
    """What the model writes after each prompt, up to `stop` or an end token."""
    sequences = [_start(tokenizer, prompt.rstrip(" ")) for prompt in prompts]  # a word begins with its space
    ids, mask = pad(sequences, pad_token(model), left=True)
    ends = list(
        dict.fromkeys([*end_tokens(model), *([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [])])
    )
    sampled: Any = copy.copy(model)  # `generate` reads what an argument leaves open from the model's generation_config
    sampled.generation_config = GenerationConfig(
        max_new_tokens=tokens, do_sample=True, temperature=temperature, top_k=0, top_p=1.0, num_beams=1,
        eos_token_id=ends or None, pad_token_id=pad_token(model),
    )  # fmt: skip
    width = ids.shape[1]
    until = StoppingCriteriaList([_Until(tokenizer, stop, width)]) if stop else None
    inputs = {"input_ids": ids.to(model.device), "attention_mask": mask.long().to(model.device)}
    with torch.no_grad():
        out = sampled.generate(**inputs, generation_config=sampled.generation_config, stopping_criteria=until)
    texts = tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
    return [_cut(text, stop) for text in texts]


def _cut(text: str, stop: str) -> str:
    """The text before `stop`, without space around it."""
    text = text.lstrip()
    return (text.split(stop, 1)[0] if stop else text).strip()


def _start(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """The prompt's tokens, without those that the tokenizer puts behind a text; of an empty prompt a token that begins one."""
    encoded = tokenizer(prompt, return_special_tokens_mask=True)
    ids, special = list(encoded.input_ids), list(encoded.special_tokens_mask)
    while len(ids) > 1 and special[-1]:
        ids.pop()
        special.pop()
    if ids:
        return ids
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return [token]
    raise CaloraError(
        "texts: written", "a prompt that begins with words, or a token that begins a text", "neither", "reword it"
    )


class _Until(StoppingCriteria):
    """Ends a row where its text has come to `stop`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: str, width: int) -> None:
        self.tokenizer, self.stop, self.width = tokenizer, stop, width

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """[B], True where a row has ended."""
        texts = self.tokenizer.batch_decode(input_ids[:, self.width :], skip_special_tokens=True)
        return torch.tensor([self.stop in text.lstrip() for text in texts], device=input_ids.device)
