"""Score a loaded method on the test split."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from calora.common.files import bytes_on_disk
from calora.common.parallel import place
from calora.evaluation.metrics import token_f1
from calora.evaluation.predict import correct, predict
from calora.models.tasks import Task, encode_all, positions
from stages.config import Params
from stages.scored import Scored
from stages.splits import read_split


def score_test(
    model: Any,
    task: Task,
    tokenizer: Any,
    params: Params,
    title: str,
    base: Path,
    adapter: Path | None,
    parameters: int,
) -> Scored:
    """Answers and whether each is right; `base` and `adapter` are the folders whose bytes count."""
    place(model)
    examples = encode_all(task, tokenizer, read_split(task.name, "test"), positions(model.config))
    predictions = predict(model, task, tokenizer, examples, params.evaluate.batch_size, f"{task.name}: {title}")
    hits = correct(predictions, examples)
    accuracy = round(sum(hits) / len(hits), 4)
    own = bytes_on_disk(adapter) if adapter else 0
    size = bytes_on_disk(base) + own
    scored = Scored(accuracy, 0.0, size, own, parameters, [int(hit) for hit in hits], predictions.answers)
    if task.scored:
        from sklearn.metrics import f1_score  # here: with pandas behind it, it takes seconds to import

        f1 = float(f1_score([e.label for e in examples], predictions.labels, average="macro"))
        return replace(scored, f1=round(f1, 4))
    shared = [token_f1(a, e.references) for a, e in zip(predictions.answers, examples, strict=True)]
    return replace(scored, em=accuracy, f1=round(sum(shared) / len(shared), 4))
