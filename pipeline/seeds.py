"""Runs that differ by their seed alone, taken together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pipeline.experiment import Experiment, Found
from stages.tables import Table, interval

NOTE = (
    "Intervals are bootstrapped over test items and seeds together; of two or three seeds they are rather too narrow."
)
OURS, FRESH = "clm_calora", "clm_lora"
ROWS = ("tasks", "recipes")  # which others a run had beside does not matter


def score_of(hits: np.ndarray[Any, Any], draws: int = 2000) -> tuple[float, list[float], list[float]]:
    """Mean over seeds and items of hits [seeds, items], its 95 % interval (both are drawn anew), and each seed's mean."""
    generator = np.random.default_rng(0)
    seeds, items = hits.shape
    means = [
        hits[np.ix_(generator.integers(seeds, size=seeds), generator.integers(items, size=items))].mean()
        for _ in range(draws)
    ]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(hits.mean()), [float(low), float(high)], hits.mean(1).tolist()


def over_seeds(experiments: Mapping[str, Experiment]) -> Table | None:
    """CA-LoRA and the fresh LoRA over seeds: a line for each task, recipe and settings that two seeds or more were run with."""
    groups: dict[tuple[str, ...], dict[Any, Found]] = {}
    keys = sorted({key for one in experiments.values() for key in one.params} - {"seed", *ROWS})
    for one in experiments.values():
        settings = [str(one.params.get(key, "")) for key in keys]
        for task, recipes in one.found.items():
            for recipe, found in recipes.items():
                groups.setdefault((task, recipe, *settings), {})[one.params.get("seed")] = found
    table = Table(
        "Means over seeds", ["task", "recipe", *keys, "seeds", "LoRA", "CA-LoRA", "95 % interval", "CA-LoRA - LoRA"],
        set(range(len(keys) + 3)) | {len(keys) + 5, len(keys) + 6},
    )  # fmt: skip
    table.notes = [NOTE]
    for row, seeds in groups.items():
        if len(seeds) > 1:
            ours, fresh = (
                np.array([found.correct[method] for found in seeds.values()], float) for method in (OURS, FRESH)
            )
            (mean, ci, _), (gain, gain_ci, _) = score_of(ours), score_of(ours - fresh)
            last = f"{gain:+.3f} {interval(gain_ci, '+')}"
            table.rows.append(
                [*row, ", ".join(map(str, seeds)), f"{fresh.mean():.3f}", f"{mean:.3f}", interval(ci), last]
            )
    return table if table.rows else None
