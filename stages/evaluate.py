"""Score the inherited adapter and CA-LoRA on the test split, loaded back from disk, and put them beside the other methods.

Reads results/<task>/reference.json, results/<task>/<recipe>/controls.json, models/compressed/<recipe>, the adapters for it, data/<task>; writes
results/<task>/<recipe>/metrics.json and models/evaluated/<task>/<recipe> (the same, answers, validation curves).
"""

from __future__ import annotations

from typing import Any

from calora.common.artifacts import read_json, whole_directory, write_json
from calora.compressed import load
from calora.evaluation.metrics import mean_interval, paired_difference, recovered_share
from stages.common import adapter, compressed, results, run
from stages.config import Params
from stages.controls import ADAPTERS, score_adapter
from stages.scoring import Scored
from stages.splits import read_task


def main(params: Params, name: str, recipe: str) -> None:
    """Eight methods, their intervals, and what CA-LoRA recovered."""
    task, model = read_task(name), load(compressed(recipe), dense=True, attention="eager")
    methods: dict[str, Scored] = {
        **read_json(results(name, "reference.json"), f"run `dvc repro reference@{name}`"),
        **read_json(results(name, recipe, "controls.json"), f"run `dvc repro controls@{name}-{recipe}`"),
    }
    for method in ("clm_inherited", "clm_calora"):
        methods[method] = score_adapter(model, task, params, recipe, method)
    answers = {method: {key: scored[key] for key in ("answers", "correct")} for method, scored in methods.items()}
    made_by = f"run `dvc repro distill@{name}-{recipe}`"
    curves = {
        method: read_json(adapter(folder, name, recipe) / "history.json", made_by)["scores"]
        for method, folder in ADAPTERS.items()
        if folder != "inherited"
    }
    metrics = summary(methods, params.evaluate.draws, params.seed)
    with whole_directory(adapter("evaluated", name, recipe)) as scratch:
        for file, value in (("metrics", metrics), ("predictions", answers), ("curves", curves)):
            write_json(scratch / f"{file}.json", value)
    write_json(results(name, recipe, "metrics.json"), metrics)


def summary(methods: dict[str, Scored], draws: int, seed: int) -> dict[str, Any]:
    """metrics.json: the methods with intervals, the paired difference, and the recovered share."""
    hits = {method: scored["correct"] for method, scored in methods.items()}
    ours, fresh, whole = hits["clm_calora"], hits["clm_lora"], hits["llm_lora"]
    return {
        "methods": {
            method: {k: v for k, v in scored.items() if k not in ("correct", "answers")}
            | {"ci": mean_interval(scored["correct"], draws, seed)}
            for method, scored in methods.items()
        },
        "difference": paired_difference(ours, fresh, draws, seed),
        "recovered_share": recovered_share(ours, fresh, whole, draws, seed),
        "test_items": len(ours),
    }


if __name__ == "__main__":
    run(main)
