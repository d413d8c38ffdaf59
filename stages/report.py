"""Gather all results. Writes results/summary.json, results/table.md and the pictures in results/plots."""

from __future__ import annotations

from typing import Any

from calora.common.files import read_json, whole_directory, write_json, write_text
from stages import plots, tables
from stages.common import evaluated, results, run
from stages.config import Params
from stages.means import over_tasks
from stages.scored import metric_of


def main(params: Params) -> None:
    """One summary over every task and recipe of this run."""
    summary: dict[str, Any] = {}
    shown = []
    every: dict[str, dict[str, Any]] = {}
    with whole_directory(results("plots")) as folder:
        for task in params.tasks:
            found: dict[str, Any] = {}
            for recipe in params.recipes:
                made_by = f"run `dvc repro evaluate@{task}-{recipe}`"
                place, title, name = evaluated(task, recipe), f"{task}, {recipe}", folder / f"{task}-{recipe}"
                metrics = found[recipe] = read_json(place / "metrics.json", made_by)
                summary.setdefault(task, {})[recipe] = compact(metrics)
                shown.append(tables.of_methods(title, metrics))
                plots.accuracy_against_bytes(metrics, title).savefig(f"{name}-bytes.png", dpi=130)
                curves = read_json(place / "curves.json", made_by)
                if curves:
                    plots.convergence(curves, title, metric_of(metrics)).savefig(f"{name}-convergence.png", dpi=130)
            if len(found) > 1:
                shown.append(tables.of_runs(f"{task}, all recipes", "recipe", found))
                plots.recipes_against_bytes(found, task).savefig(folder / f"{task}-recipes.png", dpi=130)
            every[task] = found
        if len(every) > 1:
            title = f"mean of {len(every)} tasks"
            means = {recipe: over_tasks([found[recipe] for found in every.values()]) for recipe in params.recipes}
            shown += [tables.of_methods(f"{title}, {recipe}", metrics) for recipe, metrics in means.items()]
            if len(means) > 1:
                shown.append(tables.of_runs(f"{title}, all recipes", "recipe", means))
            plots.front(means, title).savefig(folder / "front.png", dpi=130)
    write_text(results("table.md"), "\n\n".join(table.markdown() for table in shown) + "\n")
    write_json(results("summary.json"), summary)


def compact(metrics: dict[str, Any]) -> dict[str, Any]:
    """The few columns that `dvc exp show` shows: each metric of each method, and what ours gains, recovers and weighs."""
    methods, ours = metrics["methods"], metrics["ours"]
    chosen = {key: m for key, m in methods.items() if key == "llm_lora" or key.startswith("clm_")}
    shown = {metric: {key: round(m[metric], 4) for key, m in chosen.items()} for metric in metrics["metrics"]}
    if "difference" in metrics:
        shown |= {"gain": metrics["difference"]["value"], "recovered": metrics["recovered_share"]["value"]}
    return shown | ({"mb": round(methods[ours]["bytes_on_disk"] / 1e6, 1)} if ours in methods else {})


if __name__ == "__main__":
    run(main)
