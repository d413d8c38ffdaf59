"""Store the teacher's outputs for every training text, from the adapter as it was stored and in its dtype.

Reads models/base, models/teacher/<task>, data/<task>; writes models/targets/<task> and models/labels/<task>.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from calora.adapters.teachers import attach_teacher
from calora.common.files import digest, whole_directory, write_json, write_text
from calora.common.parallel import place
from calora.distillation.targets import write_targets
from calora.evaluation.predict import predict
from calora.models.loading import load_model, load_tokenizer, training_attention
from calora.models.tasks import Task, encode_all, positions
from stages.common import BASE, data, labels, run, targets, teacher
from stages.config import Params
from stages.gathering import gathered
from stages.splits import has_labels, read_split, read_task


def main(params: Params, name: str) -> None:
    """The teacher's outputs of one task."""
    task, batch, top_k = read_task(name), params.train.eval_batch_size, params.teacher.top_k
    model, tokenizer = load_model(BASE, attention=training_attention()), load_tokenizer(BASE)
    attach_teacher(model, teacher(name), name)
    place(model)
    with gathered(targets(name), digest(BASE, teacher(name), data(name)), batch, top_k, str(model.dtype)) as folder:
        for split in ("train", "unlabelled"):
            examples = encode_all(task, tokenizer, read_split(name, split), positions(model.config))
            if examples:
                title = f"{name}: targets of {split}"
                write_targets(folder / split, model, task, tokenizer, examples, batch, top_k, title)
        store_labels(task, model, tokenizer, batch)


def store_labels(task: Task, model: Any, tokenizer: Any, batch: int) -> None:
    """The teacher's answers to validation and test texts that have no labels: they choose and score in their place."""
    with whole_directory(labels(task.name)) as scratch:
        missing = [split for split in ("validation", "test") if not has_labels(read_split(task.name, split))]
        for split in missing:
            examples = encode_all(task, tokenizer, read_split(task.name, split), positions(model.config))
            title = f"{task.name}: the teacher answers {split}"
            said = predict(model, task, tokenizer, examples, batch, title)
            key, answers = ("label", said.labels) if task.scored else ("answer", said.answers)
            write_text(scratch / f"{split}.jsonl", "".join(json.dumps({key: answer}) + "\n" for answer in answers))
            shares = Counter(said.answers).most_common(6)
            print(f"{title}:", ", ".join(f"{count / len(examples):.2f} {answer!r:.40}" for answer, count in shares))
        if not missing:
            write_json(scratch / "none.json", {"reason": "validation and test texts have labels of their own"})


if __name__ == "__main__":
    run(main)
