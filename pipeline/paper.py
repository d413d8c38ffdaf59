"""The paper's ablation (its table of inherit, recover, distil) and its convergence figure, as sweeps of ordinary experiments."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from calora.common.artifacts import write_text
from pipeline.experiment import files_of
from pipeline.seeds import NOTE, score_of
from pipeline.settings import KEYS
from pipeline.sweep import sweep
from stages import plots
from stages.tables import Table, interval

SWITCHES = {name: KEYS[name] for name in ("inherit", "recover", "distil")}
METHOD = "clm_calora"


def ablation(root: Path, task: str, recipe: str, seeds: Sequence[int]) -> Path:
    """Eight cells of inherit x recover x distil, each with some seeds; writes results/ablation-<task>-<recipe>.{md,png}."""
    cells = list(itertools.product(itertools.product((False, True), repeat=len(SWITCHES)), seeds))
    wanted = [
        {"tasks": [task], "recipes": [recipe], "seed": seed, **dict(zip(SWITCHES.values(), on, strict=True))}
        for on, seed in cells
    ]
    names = sweep(root, f"ablation-{task}-{recipe}", wanted, switches_of)
    hits: dict[tuple[bool, ...], list[list[int]]] = {}
    for (on, _), name in zip(cells, names, strict=True):
        files = files_of(root, name)
        answers = json.loads(files(f"models/evaluated/{task}/{recipe}/predictions.json"))
        hits.setdefault(on, []).append(answers[METHOD]["correct"])
    answered = {on: np.array(rows, float) for on, rows in hits.items()}
    scores = {on: score_of(rows) for on, rows in answered.items()}
    table = Table(
        f"Ablation: {task}, {recipe}, seeds {', '.join(map(str, seeds))}",
        [*SWITCHES, "accuracy", "95 % interval", *(f"seed {seed}" for seed in seeds)], {4},
    )  # fmt: skip
    for on, (mean, ci, each) in scores.items():
        marks = ["yes" if value else "-" for value in on]
        table.rows.append([*marks, f"{mean:.3f}", interval(ci), *(f"{one:.3f}" for one in each)])
    table.notes = [*(effect(answered, place) for place in range(len(SWITCHES))), NOTE]
    stem = root / f"results/ablation-{task}-{recipe}"
    write_text(stem.with_suffix(".md"), table.markdown() + "\n")
    named = {
        " + ".join(itertools.compress(SWITCHES, on)) or "none": {METHOD: {"accuracy": mean, "ci": ci}}
        for on, (mean, ci, _) in scores.items()
    }
    plots.ranking(named, f"{task}, {recipe}").savefig(stem.with_suffix(".png"), dpi=130)
    return stem.with_suffix(".md")


def effect(answered: Mapping[tuple[bool, ...], np.ndarray[Any, Any]], place: int) -> str:
    """What one switch adds, on average over the settings of the others: the paired difference, in words."""
    pairs = len(answered) // 2
    gains = sum((rows if on[place] else -rows) / pairs for on, rows in answered.items())
    mean, ci, _ = score_of(np.asarray(gains))
    return f"{list(SWITCHES)[place]} adds {mean:+.3f} {interval(ci, '+')}, on average over the other two."


def switches_of(cell: Mapping[str, Any]) -> str:
    """Of a cell of the ablation: inherit-distil-seed0."""
    return f"{'-'.join(name for name, key in SWITCHES.items() if cell[key]) or 'none'}-seed{cell['seed']}"


def convergence(root: Path, task: str, recipes: Sequence[str], eval_every: int = 10) -> Path:
    """Validation accuracy against step of CA-LoRA and the fresh LoRA; writes results/convergence-<task>.png."""
    cell = {"tasks": [task], "recipes": list(recipes), "train.eval_every": eval_every}
    (name,) = sweep(root, f"convergence-{task}", [cell], lambda _: "-".join(recipes))
    files = files_of(root, name)
    curves = {recipe: json.loads(files(f"models/evaluated/{task}/{recipe}/curves.json")) for recipe in recipes}
    path = root / f"results/convergence-{task}.png"
    plots.convergences(curves, task).savefig(path, dpi=130)
    return path
