"""Score a loaded method on the test split."""

from __future__ import annotations

from typing import Any

from sklearn.metrics import f1_score

from calora.common.parallel import place
from calora.evaluation.metrics import token_f1
from calora.evaluation.predict import correct, predict
from calora.models.tasks import Task, encode_all
from stages.config import Params
from stages.splits import read_split

Scored = dict[str, Any]


def score_test(
    model: Any, task: Task, tokenizer: Any, params: Params, method: str, bytes_on_disk: int, parameters: int
) -> Scored:
    """Answers and whether each is right, with F1 (macro over labels; of shared words for a generated answer)."""
    place(model)
    examples = encode_all(task, tokenizer, read_split(task.name, "test"))
    predictions = predict(model, task, tokenizer, examples, params.evaluate.batch_size, f"{task.name}: {method}")
    hits = correct(predictions, examples)
    scored: Scored = {
        "accuracy": round(sum(hits) / len(hits), 4),
        "bytes_on_disk": bytes_on_disk,
        "trainable_parameters": parameters,
        "correct": [int(hit) for hit in hits],
        "answers": predictions.answers,
    }
    if task.scored:
        scored["f1"] = round(float(f1_score([e.label for e in examples], predictions.labels, average="macro")), 4)
    else:
        f1 = [token_f1(a, e.references) for a, e in zip(predictions.answers, examples, strict=True)]
        scored |= {"em": scored["accuracy"], "f1": round(sum(f1) / len(f1), 4)}
    return scored
