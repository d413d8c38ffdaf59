"""Score every method on the test split, each loaded back from disk.

Reads results/<task>/reference.json, models/compressed/<recipe>, the four adapters for it, data/<task>; writes
results/<task>/<recipe>/metrics.json and models/evaluated/<task>/<recipe> (the same, answers, validation curves).
"""

from __future__ import annotations

from typing import Any

from calora.adapters import lora_bytes, read_adapter
from calora.artifacts import bytes_on_disk, read_json, whole_directory, write_json
from calora.compressed import load
from calora.metrics import mean_interval, paired_difference, recovered_share
from calora.recovery import activate
from stages.common import adapter, compressed, results, run
from stages.config import Params
from stages.scoring import Scored, score_test
from stages.splits import read_task

ADAPTERS = {"clm_inherited": "inherited", "clm_lora": "clm_lora", "clm_lora_qk": "clm_lora_qk", "clm_calora": "calora"}


def main(params: Params, name: str, recipe: str) -> None:
    """Eight methods, their intervals, and what CA-LoRA recovered."""
    task = read_task(name)
    methods: dict[str, Scored] = read_json(results(name, "reference.json"), f"run `dvc repro reference@{name}`")
    model = load(compressed(recipe), dense=True, attention="eager")
    size, tokenizer = bytes_on_disk(compressed(recipe)), model.calora_tokenizer
    methods["clm"] = score_test(model, task, tokenizer, params, "clm", size, 0)
    for method, folder in ADAPTERS.items():
        path = adapter(folder, name, recipe)
        model.load_adapter(path, method)
        model.set_adapter(method)
        if method == "clm_inherited":  # the adapter as it was trained on the LLM, without the bypass
            activate(model, None)
            own, parameters = lora_bytes(path), 0
        else:
            own, parameters = bytes_on_disk(path), read_adapter(path).parameters
        methods[method] = score_test(model, task, tokenizer, params, method, size + own, parameters)
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
