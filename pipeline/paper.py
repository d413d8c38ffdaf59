"""The paper's ablation (its table of inherit, recover, distil) and its convergence figure, as sweeps of ordinary experiments."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from calora.common.files import write_text
from calora.evaluation.statistics import difference_over_seeds, mean_over_seeds
from pipeline.experiment import files_of, items_of
from pipeline.seeds import NOTE, spelled
from pipeline.sweep import sweep
from stages import plots
from stages.looks import METRICS, key_of
from stages.scored import metric_of
from stages.tables import Table, interval

Cell = tuple[bool, ...]
PARTS = ("inherit", "recover", "distil")
CELLS: dict[Cell, str] = {  # which of the three a method has
    (False, False, False): "clm_lora_same", (True, False, False): "only_inherit", (False, True, False): "only_recover",
    (False, False, True): "only_distil", (False, True, True): "no_inherit", (True, False, True): "no_recover",
    (True, True, False): "no_distil", (True, True, True): "calora",
}  # fmt: skip
Hits = Mapping[Cell, np.ndarray[Any, Any]]  # cell -> the score of each item, [seeds, items]


def ablation(root: Path, task: str, recipe: str, seeds: Sequence[int]) -> Path:
    """Eight cells of inherit x recover x distil, an experiment a seed; writes results/ablation-<task>-<recipe>.{md,png}."""
    shared = {"tasks": [task], "recipes": [recipe], "compare": list(CELLS.values())}
    names = sweep(root, f"ablation-{task}-{recipe}", [{**shared, "seed": seed} for seed in seeds], seed_of)
    answers = [json.loads(files_of(root, name)(f"models/evaluated/{task}/{recipe}/predictions.json")) for name in names]
    metrics = json.loads(files_of(root, names[0])(f"models/evaluated/{task}/{recipe}/metrics.json"))
    metric, bounded = metric_of(metrics), metrics.get("per_item", True)
    hits = {on: np.array([items_of(one[key_of(cell)]) for one in answers], float) for on, cell in CELLS.items()}
    scores = {on: mean_over_seeds(rows, bounded) for on, rows in sorted(hits.items())}
    table = Table(
        f"Ablation: {task}, {recipe}, seeds {', '.join(map(str, seeds))}",
        [*PARTS, METRICS[metric], "95 % interval", *(f"seed {seed}" for seed in seeds)], {4},
    )  # fmt: skip
    for on, scored in scores.items():
        table.rows.append(["yes" if value else "-" for value in on] + spelled(scored))
    table.notes = [*(effect(hits, place, bounded) for place in range(len(PARTS))), NOTE]
    stem = root / f"results/ablation-{task}-{recipe}"
    write_text(stem.with_suffix(".md"), table.markdown() + "\n")
    named = {
        " + ".join(itertools.compress(PARTS, on)) or "none": {"clm_calora": {"score": one.value, "ci": list(one.ci)}}
        for on, one in scores.items()
    }
    plots.ranking(named, f"{task}, {recipe}", metric).savefig(stem.with_suffix(".png"), dpi=130)
    return stem.with_suffix(".md")


def effect(hits: Hits, place: int, bounded: bool = True) -> str:
    """What one part adds, on average over the settings of the others: the paired difference, in words."""
    with_it, without = (
        np.mean([rows for on, rows in hits.items() if on[place] == has], axis=0) for has in (True, False)
    )
    gain = difference_over_seeds(with_it, without, bounded)
    return f"{PARTS[place]} adds {gain.value:+.3f} {interval(gain.ci, '+')}, on average over the other two."


def seed_of(cell: Mapping[str, Any]) -> str:
    """The label of one experiment of the ablation."""
    return f"seed{cell['seed']}"


def convergence(root: Path, task: str, recipes: Sequence[str], eval_every: int = 10) -> Path:
    """The validation score against step of every trained method; writes results/convergence-<task>.png."""
    cell = {"tasks": [task], "recipes": list(recipes), "train.eval_every": eval_every}
    (name,) = sweep(root, f"convergence-{task}", [cell], lambda _: "-".join(recipes))
    files = files_of(root, name)
    curves = {recipe: json.loads(files(f"models/evaluated/{task}/{recipe}/curves.json")) for recipe in recipes}
    metrics = json.loads(files(f"models/evaluated/{task}/{recipes[0]}/metrics.json"))
    path = root / f"results/convergence-{task}.png"
    plots.convergences(curves, task, metric_of(metrics)).savefig(path, dpi=130)
    return path
