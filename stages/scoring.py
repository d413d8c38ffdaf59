"""Score a loaded method on the test split."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from sklearn.metrics import f1_score

from calora.common.artifacts import read_json
from calora.common.parallel import place
from calora.evaluation.metrics import token_f1
from calora.evaluation.predict import correct, predict
from calora.models.tasks import Task, encode_all
from stages.config import Params
from stages.splits import read_split


@dataclass(frozen=True)
class Scored:
    """What a method gave on the test split.

    Args:
        accuracy: share of right answers; of a generated task, of exact matches.
        f1: macro over labels; of shared words for a generated answer.
        bytes_on_disk: of the model and its adapter.
        trainable_parameters: of the adapter.
        correct: whether each item is right, in the order of the split.
        answers: the answer to each item.
        em: exact match, of a generated task.
        packed: the accuracy of the packed weights, as they are shipped, where the others are of their dense view.
        curve: validation scores by step.
    """

    accuracy: float
    f1: float
    bytes_on_disk: int
    trainable_parameters: int
    correct: list[int]
    answers: list[str]
    em: float | None = None
    packed: float | None = None
    curve: list[dict[str, float]] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """What metrics.json says of it, besides intervals."""
        left_out = ("correct", "answers", "curve")
        return {key: value for key, value in asdict(self).items() if key not in left_out and value is not None}


def read_scored(path: Path, made_by: str) -> dict[str, Scored]:
    """Method -> what it gave, as a stage wrote it."""
    return {method: Scored(**scored) for method, scored in read_json(path, made_by).items()}


def score_test(
    model: Any, task: Task, tokenizer: Any, params: Params, title: str, bytes_on_disk: int = 0, parameters: int = 0
) -> Scored:
    """Answers and whether each is right."""
    place(model)
    examples = encode_all(task, tokenizer, read_split(task.name, "test"))
    predictions = predict(model, task, tokenizer, examples, params.evaluate.batch_size, f"{task.name}: {title}")
    hits = correct(predictions, examples)
    accuracy = round(sum(hits) / len(hits), 4)
    scored = Scored(accuracy, 0.0, bytes_on_disk, parameters, [int(hit) for hit in hits], predictions.answers)
    if task.scored:
        f1 = float(f1_score([e.label for e in examples], predictions.labels, average="macro"))
        return replace(scored, f1=round(f1, 4))
    shared = [token_f1(a, e.references) for a, e in zip(predictions.answers, examples, strict=True)]
    return replace(scored, em=accuracy, f1=round(sum(shared) / len(shared), 4))
