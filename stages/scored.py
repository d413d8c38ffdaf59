"""What a method gave on the test split, as it is stored between stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from calora.common.files import read_json


@dataclass(frozen=True)
class Scored:
    """What a method gave on the test split.

    Args:
        accuracy: share of right answers; of a generated task, of exact matches.
        scores: each metric of the task, by name; the first one counts.
        bytes_on_disk: of the model and its adapter.
        adapter_bytes: of the adapter alone: what each further task adds on the same model.
        trainable_parameters: of the adapter.
        correct: whether each item is right, in the order of the split.
        answers: the answer to each item.
        items: what each item gives to the metric that counts (`calora.evaluation.metrics.items_of`).
        pairs: whether that is a pair of labels; else it is the item's score, and the metric their mean.
        downloaded_bytes: of the file that the uncompressed model was made from, which may hold it in fewer bits.
        packed: the metric that counts, of the packed weights, as they are shipped, where the others are of their dense view.
        curve: validation scores by step.
    """

    accuracy: float
    scores: dict[str, float]
    bytes_on_disk: int
    adapter_bytes: int
    trainable_parameters: int
    correct: list[int]
    answers: list[str]
    items: list[float]
    pairs: bool
    downloaded_bytes: int | None = None
    packed: float | None = None
    curve: list[dict[str, float]] = field(default_factory=list)

    @property
    def metric(self) -> str:
        """The metric that counts."""
        return next(iter(self.scores))

    @property
    def score(self) -> float:
        """The metric that counts, as a number."""
        return self.scores[self.metric]

    def summary(self) -> dict[str, Any]:
        """What metrics.json says of it, besides intervals: `score` is the metric that counts."""
        left_out = ("correct", "answers", "items", "pairs", "curve", "scores")
        kept = {key: value for key, value in asdict(self).items() if key not in left_out and value is not None}
        return {"score": self.score, **kept, **self.scores}


def value_of(method: Mapping[str, Any]) -> float:
    """The metric that counts, of a method in metrics.json; results of before have accuracies alone."""
    return float(method["score"] if "score" in method else method["accuracy"])


def metric_of(metrics: Mapping[str, Any]) -> str:
    """The name of the metric that counts, of metrics.json."""
    return str(metrics.get("metric", "accuracy"))


def read_scored(path: Path, made_by: str) -> dict[str, Scored]:
    """Method -> what it gave, as a stage wrote it."""
    return {method: Scored(**scored) for method, scored in read_json(path, made_by).items()}
