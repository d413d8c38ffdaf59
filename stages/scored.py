"""What a method gave on the test split, as it is stored between stages."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from calora.common.files import read_json


@dataclass(frozen=True)
class Scored:
    """What a method gave on the test split.

    Args:
        accuracy: share of right answers; of a generated task, of exact matches.
        f1: macro over labels; of shared words for a generated answer.
        bytes_on_disk: of the model and its adapter.
        adapter_bytes: of the adapter alone: what each further task adds on the same model.
        trainable_parameters: of the adapter.
        correct: whether each item is right, in the order of the split.
        answers: the answer to each item.
        em: exact match, of a generated task.
        downloaded_bytes: of the file that the uncompressed model was made from, which may hold it in fewer bits.
        packed: the accuracy of the packed weights, as they are shipped, where the others are of their dense view.
        curve: validation scores by step.
    """

    accuracy: float
    f1: float
    bytes_on_disk: int
    adapter_bytes: int
    trainable_parameters: int
    correct: list[int]
    answers: list[str]
    em: float | None = None
    downloaded_bytes: int | None = None
    packed: float | None = None
    curve: list[dict[str, float]] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """What metrics.json says of it, besides intervals."""
        left_out = ("correct", "answers", "curve")
        return {key: value for key, value in asdict(self).items() if key not in left_out and value is not None}


def read_scored(path: Path, made_by: str) -> dict[str, Scored]:
    """Method -> what it gave, as a stage wrote it."""
    return {method: Scored(**scored) for method, scored in read_json(path, made_by).items()}
