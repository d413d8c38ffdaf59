"""Score a loaded method on the test split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from calora.common.files import bytes_on_disk
from calora.common.parallel import place
from calora.evaluation.metrics import counts_pairs, value_of
from calora.evaluation.predict import correct, measured, predict
from calora.models.tasks import Task, encode_all, positions
from stages.config import Params
from stages.scored import Scored
from stages.splits import read_checked


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
    examples = encode_all(task, tokenizer, read_checked(task.name, "test"), positions(model.config))
    predictions = predict(model, task, tokenizer, examples, params.evaluate.batch_size, f"{task.name}: {title}")
    items = {metric: measured(metric, task, predictions, examples) for metric in task.metrics}
    scores = {metric: float(value_of(metric, counts_pairs(metric, task))(found)) for metric, found in items.items()}
    hits = correct(predictions, examples)
    own = bytes_on_disk(adapter) if adapter else 0
    return Scored(
        sum(hits) / len(hits), scores, bytes_on_disk(base) + own, own, parameters, [int(hit) for hit in hits],
        predictions.answers, items[task.metrics[0]], counts_pairs(task.metrics[0], task),
    )  # fmt: skip
