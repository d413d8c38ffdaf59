"""Runs that differ by their seed alone, taken together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from calora.evaluation.statistics import Estimate, OverSeeds, difference_over_seeds, mean_over_seeds, mean_over_tasks
from pipeline.experiment import Experiment, Found
from stages.tables import Table, interval, short, with_metric

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
    together: dict[tuple[str, ...], list[Compared]] = {}
    for (task, *row), seeds in groups(experiments, keys):
        if len(seeds) > 1 and (found := compared(list(seeds.values()))):
            same = (*row, ", ".join(map(str, seeds)))
            together.setdefault(same, []).append(found)
            metrics = next(iter(seeds.values())).metrics
            table.rows.append([with_metric(task, metrics), *same, *found.cells()])
    for same, tasks in together.items():
        if len(tasks) > 1:
            table.rows.append([f"mean of {len(tasks)} tasks", *same, *mean_of(tasks).cells()])
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


@dataclass(frozen=True)
class Compared:
    """Our method and the baseline, by name, and what ours is above it."""

    names: tuple[str, str]
    ours: Estimate
    baseline: Estimate
    gain: Estimate

    def cells(self) -> list[str]:
        """The baseline's mean, ours with its interval, and the difference with its own."""
        own, fresh = map(short, self.names)
        return [
            f"{self.baseline.value:.3f} ({fresh})", f"{self.ours.value:.3f} ({own})", interval(self.ours.ci),
            f"{self.gain.value:+.3f} {interval(self.gain.ci, '+')}",
        ]  # fmt: skip


def compared(seeds: list[Found]) -> Compared | None:
    """The two over seeds; None where a run has not both."""
    names = (seeds[0].metrics["ours"], seeds[0].metrics["baseline"])
    if any(name not in found.items for found in seeds for name in names):
        return None
    own, fresh = ([found.items[name] for found in seeds] for name in names)
    bounded = seeds[0].metrics.get("per_item", True)
    ours, baseline = (mean_over_seeds(rows, bounded) for rows in (own, fresh))
    return Compared(names, ours, baseline, difference_over_seeds(own, fresh, bounded))


def mean_of(tasks: list[Compared]) -> Compared:
    """The two over tasks."""
    ours, baseline, gain = (
        mean_over_tasks([getattr(one, part) for one in tasks]) for part in ("ours", "baseline", "gain")
    )
    return Compared(tasks[0].names, ours, baseline, gain)


def spelled(scored: OverSeeds) -> list[str]:
    """Cells: the mean, its interval, and each seed's mean."""
    return [f"{scored.value:.3f}", interval(scored.ci), *(f"{mean:.3f}" for mean in scored.means)]
