"""Runs that differ by their seed alone, taken together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from calora.evaluation.statistics import OverSeeds, difference_over_seeds, mean_over_seeds
from pipeline.experiment import Experiment, Found
from stages.tables import Table, interval, short

NOTE = "Intervals are over seeds and test items together."
ROWS = ("tasks", "recipes", "compare")  # which others a run had beside does not matter


def over_seeds(experiments: Mapping[str, Experiment]) -> Table | None:
    """Our method and the baseline over seeds: a line for each task, recipe and settings that two seeds or more were run with."""
    keys = sorted({key for one in experiments.values() for key in one.params} - {"seed", *ROWS})
    table = Table(
        "Means over seeds", ["task", "recipe", *keys, "seeds", "baseline", "ours", "95 % interval", "ours - baseline"],
        set(range(len(keys) + 3)) | {len(keys) + 5, len(keys) + 6},
    )  # fmt: skip
    table.notes = [NOTE]
    for row, seeds in groups(experiments, keys):
        if len(seeds) > 1:
            table.rows.append([*row, ", ".join(map(str, seeds)), *compared(list(seeds.values()))])
    return table if table.rows else None


def groups(
    experiments: Mapping[str, Experiment], keys: list[str]
) -> Iterator[tuple[tuple[str, ...], dict[object, Found]]]:
    """(task, recipe, settings), and seed -> what a run with it gave: a group for each commit; of equal runs the first counts."""
    found: dict[tuple[str, tuple[str, ...]], dict[object, Found]] = {}
    for one in experiments.values():
        settings = [str(one.params.get(key, "")) for key in keys]
        for task, recipes in one.found.items():
            for recipe, result in recipes.items():
                group = found.setdefault((one.commit, (task, recipe, *settings)), {})
                group.setdefault(one.params.get("seed"), result)
    return ((row, seeds) for (_, row), seeds in found.items())


def compared(seeds: list[Found]) -> list[str]:
    """Cells: the baseline's mean, ours with its interval, and the difference with its own."""
    ours, baseline = (seeds[0].metrics[key] for key in ("ours", "baseline"))
    hits = {key: [found.correct[key] for found in seeds] for key in (ours, baseline) if key in seeds[0].correct}
    if len(hits) < 2:
        return ["", "", "", ""]
    own, gain = mean_over_seeds(hits[ours]), difference_over_seeds(hits[ours], hits[baseline])
    fresh = mean_over_seeds(hits[baseline])
    return [
        f"{fresh.value:.3f} ({short(baseline)})", f"{own.value:.3f} ({short(ours)})", interval(own.ci),
        f"{gain.value:+.3f} {interval(gain.ci, '+')}",
    ]  # fmt: skip


def spelled(scored: OverSeeds) -> list[str]:
    """Cells: the mean, its interval, and each seed's mean."""
    return [f"{scored.value:.3f}", interval(scored.ci), *(f"{mean:.3f}" for mean in scored.means)]
