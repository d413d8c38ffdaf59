"""Train the base: a T5 v1.0 (ReLU, tied table, relative positions) from nothing, by span corruption, then on tasks."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, T5Config, T5ForConditionalGeneration

from benchmarks.t5.texts import Sets, mixed, pieces, texts_of, tokenizer_of, training_rows, with_gaps
from calora.common.batching import epoch_batches
from calora.common.files import fingerprint, read_json, whole_directory, write_json
from calora.distillation.loss import task_loss
from calora.distillation.training import Checkpoint, Losses, Schedule, train
from calora.models.families import family_of
from calora.models.loading import load_model, load_tokenizer, training_attention
from calora.models.tasks import Example
from stages.config import Params

CHECKPOINTS = Path("checkpoints/t5")


@dataclass(frozen=True)
class Shape:
    """Size of model and batches. The feed-forward is wide, as T5-3B's is (16 times the width of the model)."""

    width: int = 256
    neurons: int = 2048
    blocks: int = 3  # of the encoder, and of the decoder
    heads: int = 4
    vocabulary: int = 8192
    sample: int = 20_000  # rows that the vocabulary is learned from
    piece: int = 140  # tokens
    pieces: int = 24  # a step
    texts: int = 96  # a step
    rate: float = 2e-3
    spread: float = 0.3  # of the first weights of the blocks, in T5's own
    table: float = 0.05  # standard deviation of the first weights of the table
    most: tuple[tuple[str, int], ...] = (("sst2", 70_000), ("qqp", 12_000), ("mnli", 8_000))  # rows of a task


Batch = Callable[[int], list[Example]]


def fresh(shape: Shape, vocabulary: int, seed: int) -> T5ForConditionalGeneration:
    """A random model in bf16, which learns fast under Adam at one rate for all weights.

    T5 divides what its tied head reads by the root of the width, so that its table has to be of the size of 1; the first weight of
    the decoder's last norm undoes that here, and the table may be small.
    """
    torch.manual_seed(seed)
    options: dict[str, Any] = dict(
        vocab_size=vocabulary, d_model=shape.width, d_kv=shape.width // shape.heads, d_ff=shape.neurons,
        num_layers=shape.blocks, num_heads=shape.heads, feed_forward_proj="relu", dropout_rate=0.0,
        initializer_factor=shape.spread, decoder_start_token_id=0, dtype="bfloat16",
    )  # fmt: skip
    model: Any = T5ForConditionalGeneration(T5Config(**options))
    with torch.no_grad():
        model.shared.weight.normal_(0, shape.table)
        model.decoder.final_layer_norm.weight.fill_(shape.width**0.5)
    made: T5ForConditionalGeneration = model.to(torch.bfloat16)
    return made


def base(params: Params, target: Path, minutes: float, share: float, shape: Shape, seed: int) -> None:
    """Train it and write it to `target`; what was done before a kill is not done again.

    Args:
        minutes: of processor time for the two trainings.
        share: of it for span corruption.
    """
    sets = training_rows(params)
    start = CHECKPOINTS / "start"
    if not start.exists():
        with whole_directory(start) as scratch:
            made = tokenizer_of(sets, shape.vocabulary, shape.sample, seed)
            made.save_pretrained(scratch)
            fresh(shape, len(made), seed).save_pretrained(scratch)
    tokenizer = load_tokenizer(start)
    gapped = phase("span corruption", start, gaps(sets, tokenizer, shape, seed), minutes * share, shape, seed)
    learned = phase("tasks", gapped, tasks(sets, tokenizer, shape, seed), minutes * (1 - share), shape, seed)
    with whole_directory(target) as scratch:
        load_model(learned, torch.bfloat16).save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
    print(f"{target}: fingerprint {fingerprint(target)}")


def gaps(sets: Sets, tokenizer: PreTrainedTokenizerBase, shape: Shape, seed: int) -> Batch:
    """The batch of each step of span corruption: other gaps whenever a piece comes again."""
    cut = pieces(tokenizer, texts_of(sets), shape.piece, seed)
    first: Any = tokenizer.convert_tokens_to_ids("<extra_id_0>")
    print(f"{len(cut)} pieces of {shape.piece} tokens", flush=True)

    def batch(step: int) -> list[Example]:
        generator = random.Random(f"{seed} {step}")
        places = [(step * shape.pieces + i) % len(cut) for i in range(shape.pieces)]
        return [with_gaps(cut[i], first, generator) for i in places]

    return batch


def tasks(sets: Sets, tokenizer: PreTrainedTokenizerBase, shape: Shape, seed: int) -> Batch:
    """The batch of each step of the tasks."""
    examples = mixed(sets, tokenizer, dict(shape.most))
    lengths = [example.tokens for example in examples]
    print(f"{len(examples)} labelled texts, {sum(lengths)} tokens", flush=True)
    each = math.ceil(len(examples) / shape.texts)  # batches of an epoch

    @cache
    def epoch(number: int) -> list[list[int]]:
        return epoch_batches(lengths, shape.texts, each, seed + number)

    return lambda step: [examples[i] for i in epoch(step // each)[step % each]]


def phase(title: str, start: Path, batch: Batch, minutes: float, shape: Shape, seed: int) -> Path:
    """One of the two trainings, from the model in `start`; returns the folder of what it ends with."""
    name = title.replace(" ", "_")
    target, plan = CHECKPOINTS / name, CHECKPOINTS / f"{name}.json"
    if target.exists():
        return target
    model = load_model(start, torch.bfloat16, training_attention())
    family = family_of(model)
    for parameter in model.parameters():
        parameter.requires_grad_(True)

    def losses_of_step(step: int) -> Iterator[tuple[Losses, int]]:
        examples = batch(step)
        found = family.collate(examples, model)
        yield {"loss": task_loss(family.forward(model, found, None), found)}, sum(e.tokens for e in examples)

    if not plan.exists():
        about = {"minutes": minutes, **asdict(shape), "seed": seed}
        write_json(plan, {"steps": steps_in(minutes, losses_of_step), **about})
    steps = int(read_json(plan, "run `python -m benchmarks.t5 train`")["steps"])
    schedule = Schedule(steps, shape.rate, max(steps // 20, 1), 1.0, 0, 120.0)
    checkpoint = Checkpoint(CHECKPOINTS / f"{name}_steps", fingerprint(start))
    history = train(model.parameters(), losses_of_step, lambda: 0.0, schedule, torch.bfloat16, checkpoint, title)
    with whole_directory(target) as scratch:
        model.save_pretrained(scratch)
        write_json(scratch / "history.json", history.to_json() | {"tokens": history.tokens, "steps": steps})
    checkpoint.clear()
    return target


def steps_in(minutes: float, losses_of_step: Callable[[int], Iterator[tuple[Losses, int]]], tried: int = 6) -> int:
    """How many steps some minutes of processor time allow, by the time of a few that change nothing."""
    for step in range(tried + 1):
        if step == 1:
            start = time.process_time()
        for losses, _ in losses_of_step(step):
            losses["loss"].backward()
    return max(round(minutes * 60 * tried / (time.process_time() - start)), 2)
