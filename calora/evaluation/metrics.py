"""Scores of generated answers, as the evaluation script of SQuAD v1.1 defines them (arXiv 1606.05250)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence


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
