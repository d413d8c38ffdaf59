"""Bytes of recovery, shared out over layers: each goes where it mends most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from heapq import merge
from typing import Self

from torch import Tensor

from calora.recovery.warmstart import spectrum


@dataclass(frozen=True)
class Spectrum:
    """What each direction of a map mends of the error of the layers that it stands beside, and what it costs.

    Args:
        gains: of squared error, in the same unit for all that share a budget, falling, at least 0.
        bytes: of each direction beside those before it, above 0: one that needs new scales costs more than the next.
    """

    gains: list[float]
    bytes: list[int]

    @classmethod
    def of(cls, error: Tensor, moment: Tensor, unit: float, bytes: list[int]) -> Self:
        """The first directions of the best map, as many as `bytes` has.

        Args:
            error: E = W - W_c [out, in].
            moment: X^T X [in, in].
            unit: the ||E X||^2 that counts as 1, above 0.
        """
        gains = spectrum(error, moment)[: len(bytes)] / unit
        return cls(gains.clamp_min(0).tolist(), bytes)

    def runs(self) -> list[tuple[float, int]]:
        """(gain a byte, directions) of runs of directions, falling; directions that mend nothing are in none.

        One that costs more than the next is in a run with it, where the two together mend more a byte than it alone.
        """
        runs: list[tuple[float, int, int]] = []  # gain, bytes, directions
        for gain, cost in zip(self.gains, self.bytes, strict=True):
            if gain > 0:
                runs.append((gain, cost, 1))
                while len(runs) > 1 and runs[-1][0] * runs[-2][1] > runs[-2][0] * runs[-1][1]:
                    last, before = runs.pop(), runs.pop()
                    runs.append((last[0] + before[0], last[1] + before[1], last[2] + before[2]))
        return [(gain / cost, count) for gain, cost, count in runs]


def share_out(spectra: Mapping[str, Spectrum], budget: float) -> dict[str, int]:
    """Name -> how many directions it gets of a budget of bytes: the run that mends most a byte first, as far as it fits."""
    ranks, full = dict.fromkeys(spectra, 0), set()
    offers = [[(-rate, name, count) for rate, count in one.runs()] for name, one in spectra.items()]
    for _, name, count in merge(*offers):  # a heap of the next run of each
        for cost in spectra[name].bytes[ranks[name] : ranks[name] + count]:
            if cost > budget or name in full:
                full.add(name)  # not the cheaper ones behind it either
                break
            ranks[name] += 1
            budget -= cost
    return ranks
