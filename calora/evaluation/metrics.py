"""Scores and their uncertainty: accuracy, F1, bootstrap intervals, paired differences, the recovered share."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]


def normalise(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces (as the SQuAD evaluation defines it)."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def token_f1(answer: str, references: Sequence[str]) -> float:
    """Best F1 of shared words over the references, in [0, 1]."""
    best = 0.0
    for reference in references:
        got, want = normalise(answer).split(), normalise(reference).split()
        shared = sum((Counter(got) & Counter(want)).values())
        best = max(best, 2 * shared / (len(got) + len(want)) if got or want else 1.0)
    return best


def bootstrap(statistic: Callable[[NDArray[np.int64]], Any], items: int, draws: int, seed: int) -> Any:
    """The statistic of each of `draws` resamples of the items' indices, [draws, ...]."""
    generator = np.random.default_rng(seed)
    return np.array([statistic(generator.integers(0, items, items)) for _ in range(draws)])


def interval(samples: Vector) -> list[float]:
    """The central 95 % of bootstrap samples."""
    low, high = np.percentile(samples, [2.5, 97.5])
    return [round(float(low), 4), round(float(high), 4)]


def mean_interval(scores: Sequence[float], draws: int, seed: int) -> list[float]:
    """95 % bootstrap interval of a mean over test items."""
    values = np.asarray(scores, dtype=float)
    return interval(bootstrap(lambda i: values[i].mean(), len(values), draws, seed))


def paired_difference(ours: Sequence[float], theirs: Sequence[float], draws: int, seed: int) -> dict[str, Any]:
    """Mean of ours - theirs over the same test items, with its 95 % interval."""
    difference = np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)
    value = round(float(difference.mean()), 4)
    return {"value": value, "ci": mean_interval(difference.tolist(), draws, seed)}


def recovered_share(
    recovered: Sequence[float], compressed: Sequence[float], uncompressed: Sequence[float], draws: int, seed: int
) -> dict[str, Any]:
    """(recovered - compressed) / (uncompressed - compressed), with its 95 % bootstrap interval over test items.

    `below_noise` is true where the interval of the denominator touches 0: then there was no gap to recover, and
    the share says nothing (its interval is null). A resample without a gap counts as if the gap were one item.
    """
    r, c, u = (np.asarray(scores, dtype=float) for scores in (recovered, compressed, uncompressed))
    gap = float((u - c).mean())
    samples = bootstrap(lambda i: [(r - c)[i].mean(), (u - c)[i].mean()], len(r), draws, seed)
    gap_interval = interval(samples[:, 1])
    below_noise = gap_interval[0] <= 0
    return {
        "value": None if gap == 0 else round(float((r - c).mean()) / gap, 4),
        "ci": None if below_noise else interval(samples[:, 0] / np.maximum(samples[:, 1], 1 / len(r))),
        "below_noise": below_noise,
        "gap": {"value": round(gap, 4), "ci": gap_interval},
    }
