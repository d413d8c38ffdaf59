"""Gather all results. Writes results/summary.json, results/table.md and the pictures in results/plots."""

from __future__ import annotations

from typing import Any

from calora.common.artifacts import read_json, whole_directory, write_json, write_text
from stages import plots, tables
from stages.common import adapter, results, run
from stages.config import Params


def main(params: Params) -> None:
    """One summary over every task and recipe of this run."""
    summary: dict[str, Any] = {}
    shown = []
    with whole_directory(results("plots")) as folder:
        for task in params.tasks:
            found: dict[str, Any] = {}
            for recipe in params.recipes:
                made_by = f"run `dvc repro evaluate@{task}-{recipe}`"
                evaluated, title, name = (
                    adapter("evaluated", task, recipe),
                    f"{task}, {recipe}",
                    folder / f"{task}-{recipe}",
                )
                metrics = found[recipe] = read_json(evaluated / "metrics.json", made_by)
                summary.setdefault(task, {})[recipe] = compact(metrics)
                shown.append(tables.of_methods(title, metrics))
                plots.accuracy_against_bytes(metrics, title).savefig(f"{name}-bytes.png", dpi=130)
                curves = read_json(evaluated / "curves.json", made_by)
                plots.convergence(curves, title).savefig(f"{name}-convergence.png", dpi=130)
            if len(found) > 1:
                shown.append(tables.of_runs(f"{task}, all recipes", "recipe", found))
                plots.recipes_against_bytes(found, task).savefig(folder / f"{task}-recipes.png", dpi=130)
    write_text(results("table.md"), "\n\n".join(table.markdown() for table in shown) + "\n")
    write_json(results("summary.json"), summary)


def compact(metrics: dict[str, Any]) -> dict[str, Any]:
    """The few columns that `dvc exp show` shows."""
    methods = metrics["methods"]
    return {
        "llm_lora": methods["llm_lora"]["accuracy"],
        "clm_lora": methods["clm_lora"]["accuracy"],
        "clm_calora": methods["clm_calora"]["accuracy"],
        "gain": metrics["difference"]["value"],
        "recovered": metrics["recovered_share"]["value"],
        "mb": round(methods["clm_calora"]["bytes_on_disk"] / 1e6, 1),
    }


if __name__ == "__main__":
    run(main)
