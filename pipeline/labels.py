"""How many labels each way to adapt needs, and how many steps: a sweep of ordinary experiments, a table and a plot."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from calora.common.files import write_text
from calora.evaluation.statistics import OverSeeds, difference_over_seeds, mean_over_seeds
from pipeline.experiment import files_of, items_of
from pipeline.seeds import NOTE, spelled
from pipeline.sweep import sweep
from stages import plots
from stages.looks import METRICS, key_of, look_of
from stages.methods import LABELS
from stages.scored import metric_of
from stages.tables import Table, interval, short

FRESH, OURS, FREE = "clm_lora", "calora", "calora_free"
METHODS = (FREE, FRESH, "no_recover", OURS)
Hits = dict[str, dict[int, Any]]  # method -> number of labels -> the score of each item, [seeds, items]
Scores = dict[str, dict[int, OverSeeds]]


def labels(
    root: Path, task: str, recipe: str, counts: Sequence[int], seeds: Sequence[int], eval_every: int = 10
) -> Path:
    """An experiment for each number of labels and each seed; writes results/labels-<task>-<recipe>.{md,png}."""
    counts = sorted(set(counts))
    runs = list(itertools.product(counts, seeds))
    shared = {"tasks": [task], "recipes": [recipe], "train.eval_every": eval_every}
    names = sweep(root, f"labels-{task}-{recipe}", [{**shared, **cell(*run)} for run in runs], name_of)
    found = {run: of_experiment(root, name, task, recipe) for run, name in zip(runs, names, strict=True)}
    hits: Hits = {}
    metrics = found[runs[0]][2]
    metric, bounded = metric_of(metrics), metrics.get("per_item", True)
    for count, method in itertools.product(counts, METHODS):
        if method in compared(count) and (method != FREE or count == counts[0]):
            rows = [items_of(found[count, seed][0][key_of(method)]) for seed in seeds]
            hits.setdefault(method, {})[count] = np.array(rows, float)
    curves = {count: mean_curves([found[count, seed][1] for seed in seeds]) for count in counts}
    scores = {
        method: {count: mean_over_seeds(rows, bounded) for count, rows in hits[method].items()}
        for method in METHODS
        if method in hits
    }
    title, stem = f"{task}, {recipe}", root / f"results/labels-{task}-{recipe}"
    write_text(
        stem.with_suffix(".md"), table_of(f"Labels: {title}", hits, scores, seeds, metric, bounded).markdown() + "\n"
    )
    shown = {
        key_of(method): {count: {"score": one.value, "ci": list(one.ci)} for count, one in ones.items()}
        for method, ones in scores.items()
    }
    plots.labels(shown, key_of(FREE), curves, title, metric).savefig(stem.with_suffix(".png"), dpi=130)
    return stem.with_suffix(".md")


def compared(count: int) -> list[str]:
    """The methods of an experiment: without labels there is nothing for a fresh LoRA to learn."""
    return [method for method in METHODS if count or method != FRESH]


def cell(count: int, seed: int) -> dict[str, Any]:
    """What an experiment changes: the others take their loss from CA-LoRA's."""
    fresh = {f"methods.{FRESH}.loss": {**LABELS, "labels": count}} if count else {}
    return {"compare": compared(count), f"methods.{OURS}.loss.labels": count, **fresh, "seed": seed}


def name_of(changed: Mapping[str, Any]) -> str:
    """The label of one experiment."""
    return f"{changed[f'methods.{OURS}.loss.labels']}-seed{changed['seed']}"


def of_experiment(
    root: Path, name: str, task: str, recipe: str
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The answers of each method, its validation curve, and metrics.json."""
    files = files_of(root, name)
    answers, curves, metrics = (
        json.loads(files(f"models/evaluated/{task}/{recipe}/{part}.json"))
        for part in ("predictions", "curves", "metrics")
    )
    return answers, curves, metrics


def mean_curves(seeds: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, float]]]:
    """Method -> its validation scores against step, the mean over seeds."""
    return {
        method: [
            {"step": rows[0]["step"], "score": float(np.mean([row["score"] for row in rows]))}
            for rows in zip(*(one[method] for one in seeds), strict=True)
        ]
        for method in seeds[0]
    }


def table_of(
    title: str, hits: Hits, scores: Scores, seeds: Sequence[int], metric: str = "accuracy", bounded: bool = True
) -> Table:
    """A line for each number of labels and method, the start without any step first; CA-LoRA against a fresh LoRA below."""
    heads = [METRICS[metric], "95 % interval", *(f"seed {seed}" for seed in seeds)]
    table = Table(f"{title}, seeds {', '.join(map(str, seeds))}", ["labels", "method", *heads], {1, 3})
    rows = [(count, method, one) for method, ones in scores.items() for count, one in ones.items()]
    for count, method, one in sorted(rows, key=lambda row: (row[1] != FREE, row[0])):
        told = "0" if method == FREE else str(count)
        table.rows.append([told, look_of(key_of(method)).label, *spelled(one)])
    for count in hits.get(FRESH, {}):
        gain = difference_over_seeds(hits[OURS][count], hits[FRESH][count], bounded)
        names = " - ".join(short(key_of(method)).removeprefix("+ ") for method in (OURS, FRESH))
        table.notes.append(f"{names} with {count} labels: {gain.value:+.3f} {interval(gain.ci, '+')}.")
    table.notes.append("Which step's parameters are kept is chosen on the labelled validation texts, in every line.")
    table.notes.append(NOTE)
    return table
