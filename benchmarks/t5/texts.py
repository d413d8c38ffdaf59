"""What the base is trained on: the training texts at hand, a vocabulary of them, gaps in them, and the tasks."""

from __future__ import annotations

import random
from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from calora.common.progress import progress
from calora.models.tasks import Example, Task
from stages.config import Params
from stages.corpora import split_pools, task_of
from stages.files import Rows

SENTINELS = 100
NOISE, SPAN = 0.15, 3  # share of the tokens that are taken out, and the mean length of a gap
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"  # 0, 1 and 2, as T5 has them
Sets = dict[str, tuple[Task, Rows]]


def training_rows(params: Params) -> Sets:
    """Of every set its task and its training rows, none of which is in a validation or test split."""
    found = {}
    for name, source in progress(params.data.sets.items(), "reading texts", "sets"):
        task = task_of(name, source)
        found[name] = (task, split_pools(params, source, task)["train"])
    return found


def texts_of(sets: Sets) -> list[str]:
    """Every text of every column of a prompt, once."""
    return list(dict.fromkeys(row[column] for task, rows in sets.values() for row in rows for column in task.columns))


def tokenizer_of(sets: Sets, vocabulary: int, sample: int, seed: int) -> PreTrainedTokenizerBase:
    """A unigram vocabulary of a sample of the rows, in their prompts and with their answers; T5's sentinels are at its end."""
    rows = [(task, row) for task, own in sets.values() for row in own]
    chosen = random.Random(seed).sample(rows, min(sample, len(rows)))
    known = [row["label"] if task.fixed else None for task, row in chosen]
    texts = [
        task.render(row) + ("" if label is None else task.answers[label])
        for (task, row), label in zip(chosen, known, strict=True)
    ]
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " ")])
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=vocabulary - SENTINELS,
        special_tokens=[PAD, END, UNKNOWN],
        unk_token=UNKNOWN,
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    made.add_special_tokens([f"<extra_id_{i}>" for i in reversed(range(SENTINELS))])
    made.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token=PAD, eos_token=END, unk_token=UNKNOWN)


def pieces(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int, seed: int) -> list[list[int]]:
    """The texts in a seeded order, each with an end token, one behind another, in pieces of `length` tokens."""
    shuffled = random.Random(seed).sample(texts, len(texts))
    encoded = tokenizer(shuffled).input_ids
    whole = [token for ids in encoded for token in ids]
    return [whole[i : i + length] for i in range(0, len(whole) - length + 1, length)]


def with_gaps(ids: Sequence[int], first: int, generator: random.Random) -> Example:
    """Span corruption (arXiv 1910.10683): a sentinel stands for each gap, and the answer is the gaps, each behind its sentinel.

    Args:
        first: the first sentinel; the next ones count down from it.
    """
    noise = max(round(len(ids) * NOISE), 1)
    count = max(round(noise / SPAN), 1)
    gaps, kept = (_parts(tokens, count, generator) for tokens in (noise, len(ids) - noise))
    prompt: list[int] = []
    answer: list[int] = []
    place = 0
    for number, (stay, leave) in enumerate(zip(kept, gaps, strict=True)):
        prompt += [*ids[place : place + stay], first - number]
        answer += [first - number, *ids[place + stay : place + stay + leave]]
        place += stay + leave
    return Example([*prompt, 1], [*answer, 1])


def _parts(whole: int, count: int, generator: random.Random) -> list[int]:
    """`whole` as a sum of `count` random numbers, each at least 1."""
    ends = sorted(generator.sample(range(1, whole), count - 1))
    return [b - a for a, b in zip([0, *ends], [*ends, whole], strict=True)]


def mixed(sets: Sets, tokenizer: PreTrainedTokenizerBase, most: dict[str, int]) -> list[Example]:
    """Labelled rows of some tasks, at most so many of each, the answer with an end token as T5 writes it."""
    examples = []
    for name, count in most.items():
        task, rows = sets[name]
        for row in [row for row in rows if row["label"] is not None][:count]:
            example = task.encode(tokenizer, row)
            examples.append(Example(example.prompt_ids, [*example.answer_ids, 1]))
    return examples
