"""Score what CA-LoRA is compared with on one compressed base: the base alone, and the fresh LoRAs.

Apart from `evaluate`, so that another alpha or start scores none of it again. Reads models/compressed/<recipe>, the two
fresh LoRAs for it, data/<task>; writes results/<task>/<recipe>/controls.json.
"""

from __future__ import annotations

from calora.adapters.folder import lora_bytes, read_adapter
from calora.common.artifacts import bytes_on_disk, write_json
from calora.compressed import Compressed, load
from calora.models.tasks import Task
from calora.recovery.bypass import activate
from stages.common import adapter, compressed, results, run
from stages.config import Params
from stages.scoring import Scored, score_test
from stages.splits import read_task

ADAPTERS = {"clm_inherited": "inherited", "clm_lora": "clm_lora", "clm_lora_qk": "clm_lora_qk", "clm_calora": "calora"}


def main(params: Params, name: str, recipe: str) -> None:
    """`clm`, `clm_lora` and `clm_lora_qk`."""
    task, model = read_task(name), load(compressed(recipe), dense=True, attention="eager")
    size = bytes_on_disk(compressed(recipe))
    methods: dict[str, Scored] = {"clm": score_test(model, task, model.calora_tokenizer, params, "clm", size, 0)}
    for method in ("clm_lora", "clm_lora_qk"):
        methods[method] = score_adapter(model, task, params, recipe, method)
    write_json(results(name, recipe, "controls.json"), methods)


def score_adapter(model: Compressed, task: Task, params: Params, recipe: str, method: str) -> Scored:
    """An adapter of a compressed base, loaded back from disk."""
    path = adapter(ADAPTERS[method], task.name, recipe)
    model.load_adapter(path, method)
    model.set_adapter(method)
    if method == "clm_inherited":  # the adapter as it was trained on the LLM, without the bypass
        activate(model, None)
        own, parameters = lora_bytes(path), 0
    else:
        own, parameters = bytes_on_disk(path), read_adapter(path).parameters
    size = bytes_on_disk(compressed(recipe)) + own
    return score_test(model, task, model.calora_tokenizer, params, method, size, parameters)


if __name__ == "__main__":
    run(main)
