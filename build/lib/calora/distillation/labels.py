"""Labels for some of the texts alone: which keep theirs, and what becomes of the others."""

from __future__ import annotations

import random
from collections.abc import Sequence

from calora.distillation.distill import Pool
from calora.errors import CaloraError


def first_labels(labels: Sequence[int], count: int, seed: int) -> list[int]:
    """Places of the texts that keep their labels, ascending: the first `count` of one seeded order.

    Those of a smaller count are among those of a larger one. Each label is spread evenly over the order, so that
    every beginning is balanced as the whole is, but for a text.

    Args:
        labels: of all texts; of generated answers, one number for all.
        count: 0 to the number of texts.

    Raises:
        CaloraError: there are not so many texts.
    """
    if not 0 <= count <= len(labels):
        raise CaloraError("labels", f"0 to {len(labels)}, the number of labelled texts", count, "lower it")
    generator = random.Random(seed)
    turns: list[tuple[float, int]] = []
    for label in sorted(set(labels)):
        places = [place for place, other in enumerate(labels) if other == label]
        generator.shuffle(places)
        turns += [((turn + 0.5) / len(places), place) for turn, place in enumerate(places)]
    return sorted(place for _, place in sorted(turns)[:count])


def with_labels(labelled: Pool, unlabelled: Pool | None, count: int, seed: int) -> tuple[Pool | None, Pool | None]:
    """The texts that are learnt from with their labels, and those without, where only `count` labels may be used.

    Labelled texts that are left out become unlabelled ones, if the teacher's targets for them are there. Not so
    those with answers of several tokens: what the teacher says there follows the right answer word by word.

    Raises:
        CaloraError: there are not so many labelled texts.
    """
    labels = [example.label for example in labelled.examples]
    kept = first_labels(labels, count, seed)
    of_one_token = (place for place, e in enumerate(labelled.examples) if e.label >= 0 and not e.choice_ids)
    left = sorted(set(of_one_token) - set(kept))
    others = labelled.take(left) if left and labelled.targets else None
    return labelled.take(kept) if kept else None, joined(others, unlabelled)


def joined(first: Pool | None, second: Pool | None) -> Pool | None:
    """The texts of both, each with the teacher's targets."""
    if first is None or second is None:
        return first or second
    assert first.targets and second.targets
    return Pool([*first.answered(), *second.answered()], first.targets.followed_by(second.targets))
