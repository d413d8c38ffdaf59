"""What is measured of answers: GLUE's and SuperGLUE's metrics of chosen ones, SQuAD v1.1's of written ones (arXiv 1606.05250).

A metric is a function of numbers that each item gives, so that every resample of the items gives it anew. For `accuracy`,
`agreement`, `em` and the `f1` of written answers they are scores, whose mean it is; the others count pairs of right and chosen labels.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calora.models.tasks import Example, Task

Numbers = NDArray[np.float64]
LABELS = 4096  # more than any task has: a pair of labels is one number, right * LABELS + chosen


def normalise(text: str) -> str:
    """Lower case, then no punctuation, then no articles, then single spaces."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(answer: str, references: Sequence[str]) -> bool:
    """Whether the answer equals some reference, both normalised."""
    return normalise(answer) in {normalise(reference) for reference in references}


def token_f1(answer: str, references: Sequence[str]) -> float:
    """Best F1 of shared words over the references, in [0, 1]; 0 where no word is shared, two empty texts included."""
    got, best = normalise(answer).split(), 0.0
    for reference in references:
        want = normalise(reference).split()
        shared = sum((Counter(got) & Counter(want)).values())
        best = max(best, 2 * shared / max(len(got) + len(want), 1))
    return best


def f1(counts: Numbers) -> Numbers:
    """F1 = 2 TP / (2 TP + FP + FN) of the second label, 0 where there is none; counts [..., right, chosen], 2 x 2."""
    return _ratio(2 * counts[..., 1, 1], counts[..., 1, :].sum(-1) + counts[..., :, 1].sum(-1))


def macro_f1(counts: Numbers) -> Numbers:
    """Mean F1 of the labels that occur, as right ones or as chosen ones; counts [..., right, chosen]."""
    hits = np.diagonal(counts, axis1=-2, axis2=-1)
    both = counts.sum(-1) + counts.sum(-2)
    return _ratio(_ratio(2 * hits, both).sum(-1), (both > 0).sum(-1))


def matthews(counts: Numbers) -> Numbers:
    """Matthews' correlation of right and chosen labels, of two or more (Gorodkin 2004); 0 where either is constant."""
    right, chosen, n = counts.sum(-1), counts.sum(-2), counts.sum((-2, -1))
    shared = np.trace(counts, axis1=-2, axis2=-1) * n - (right * chosen).sum(-1)
    spread = (n**2 - (right**2).sum(-1)) * (n**2 - (chosen**2).sum(-1))
    return _ratio(shared, np.sqrt(spread))


OF_COUNTS: dict[str, Callable[[Numbers], Numbers]] = {"f1": f1, "macro_f1": macro_f1, "matthews": matthews}


def counts_pairs(metric: str, task: Task) -> bool:
    """Whether a metric counts pairs of right and chosen labels; else it is the mean of the items' scores."""
    return task.scored and metric in OF_COUNTS


def items_of(
    metric: str, task: Task, labels: Sequence[int], answers: Sequence[str], examples: Sequence[Example]
) -> list[float]:
    """What each item gives to a metric: its score, or one number for its right and its chosen label (see `value_of`).

    Args:
        labels, answers: what was answered; labels are -1 for written answers.
    """
    if not task.scored:
        score: Callable[[str, Sequence[str]], float] = token_f1 if metric == "f1" else exact_match
        return [float(score(answer, e.references)) for answer, e in zip(answers, examples, strict=True)]
    both = zip((example.label for example in examples), labels, strict=True)
    if metric in OF_COUNTS:
        return [float(right * LABELS + chosen) for right, chosen in both]
    return [float(right == chosen) for right, chosen in both]


def value_of(metric: str, pairs: bool) -> Callable[..., Any]:
    """The metric as a function of what items give, `(items [..., n], axis) -> [...]`.

    Args:
        pairs: whether an item gives a pair of labels (`counts_pairs`).
    """
    if not pairs:
        return np.mean

    def of_items(items: Any, axis: int = -1) -> Any:
        return OF_COUNTS[metric](counted(np.moveaxis(np.asarray(items), axis, -1)))

    return of_items


def counted(items: Numbers) -> Numbers:
    """How many items have each pair of labels: [..., n] -> [..., right, chosen]; both up to the highest one, 2 or more."""
    right, chosen = np.divmod(items, LABELS)
    places = range(max(2, int(max(right.max(), chosen.max())) + 1))
    rows = (np.stack([((right == i) & (chosen == j)).sum(-1) for j in places], -1) for i in places)
    return np.stack([*rows], -2).astype(float)


def linear(metric: str, pairs: bool, items: Sequence[float]) -> list[float]:
    """A score for each item, whose mean is the metric and whose spread is that of the metric: v_i = m + n dm / dw_i.

    w_i is the weight of item i. For a mean they are the items' own scores; for the others this is the infinitesimal
    jackknife (Efron 1982), by which what holds of means (effects of seeds and of items) holds of them too.
    """
    if not pairs:
        return list(items)
    numbers = np.asarray(items)
    counts, step = counted(numbers), 1e-3  # of an item; a cell that is differentiated holds one or more
    whole, slopes = float(OF_COUNTS[metric](counts)), np.zeros_like(counts)
    for cell in map(tuple, np.argwhere(counts)):
        around = counts.copy(), counts.copy()
        around[0][cell] += step
        around[1][cell] -= step
        more, less = (float(OF_COUNTS[metric](one)) for one in around)
        slopes[cell] = (more - less) / (2 * step)
    right, chosen = np.divmod(numbers.astype(int), LABELS)
    scores: list[float] = (whole + len(items) * slopes[right, chosen]).tolist()
    return scores


def _ratio(part: Numbers, whole: Numbers) -> Numbers:
    """part / whole, 0 where whole is 0."""
    found: Numbers = np.divide(part, whole, out=np.zeros(np.shape(whole)), where=np.asarray(whole) > 0)
    return found
