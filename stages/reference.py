"""Score what needs no compressed base, once a task. Writes results/<task>/reference.json.

Reads models/base, models/teacher/<task>, models/small, models/small_lora/<task>, data/<task>.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch

from calora.adapters.folder import read_plain_lora
from calora.adapters.lora import attach_adapter, set_active
from calora.adapters.places import CONFIG
from calora.adapters.teachers import WHOLE, attach_teacher
from calora.common.files import read_json, write_json
from calora.models.loading import load_model, load_tokenizer, training_attention
from stages.common import BASE, DOWNLOADED, SMALL, results, run, small_lora, teacher
from stages.config import Params
from stages.scoring import score_test
from stages.splits import read_task


def main(params: Params, name: str) -> None:
    """`llm`, `llm_lora` and, where the small baseline has one, `small_lora`."""
    task, tokenizer = read_task(name), load_tokenizer(BASE)
    model = load_model(BASE, attention=training_attention())
    methods = {"llm": score_test(model, task, tokenizer, params, "llm", BASE, None, 0)}
    downloaded = read_json(BASE / DOWNLOADED, "run `dvc repro base`")["bytes"]
    methods["llm"] = replace(methods["llm"], downloaded_bytes=downloaded)
    folder = teacher(name)
    size = attach_teacher(model, folder, name)
    stored = folder / WHOLE if (folder / WHOLE).exists() else folder
    methods["llm_lora"] = score_test(model, task, tokenizer, params, "llm_lora", BASE, stored, size)
    folder = small_lora(name)
    if (folder / CONFIG).exists():
        small: Any = load_model(SMALL, torch.float32, labels=len(task.answers))
        trained = read_plain_lora(folder)
        attach_adapter(small, trained, name)
        set_active(small, name)
        methods["small_lora"] = score_test(
            small, task, load_tokenizer(SMALL), params, "small_lora", SMALL, folder, trained.parameters
        )
    write_json(results(name, "reference.json"), {method: asdict(scored) for method, scored in methods.items()})


if __name__ == "__main__":
    run(main)
