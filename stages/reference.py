"""Score what needs no compressed base, once a task. Writes results/<task>/reference.json.

Reads models/base, models/teacher/<task>, models/small, models/small_lora/<task>, data/<task>.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from calora.adapters.folder import read_plain_lora
from calora.adapters.lora import attach_adapter, set_active
from calora.common.files import bytes_on_disk, write_json
from calora.models.loading import load_model, load_tokenizer, training_attention
from stages.common import BASE, SMALL, results, run, small_lora, teacher
from stages.config import Params
from stages.scoring import score_test
from stages.splits import read_task


def main(params: Params, name: str) -> None:
    """`llm`, `llm_lora` and, for a scored task, `small_lora`."""
    task, tokenizer = read_task(name), load_tokenizer(BASE)
    model = load_model(BASE, attention=training_attention())
    methods = {"llm": score_test(model, task, tokenizer, params, "llm", bytes_on_disk(BASE))}
    lora = read_plain_lora(teacher(name))
    attach_adapter(model, lora, name)
    set_active(model, name)
    size = bytes_on_disk(BASE) + bytes_on_disk(teacher(name))
    methods["llm_lora"] = score_test(model, task, tokenizer, params, "llm_lora", size, lora.parameters)
    if task.scored:
        folder = small_lora(name)
        small: Any = load_model(SMALL, torch.float32, labels=len(task.answers))
        trained = read_plain_lora(folder)
        attach_adapter(small, trained, name)
        set_active(small, name)
        size = bytes_on_disk(SMALL) + bytes_on_disk(folder)
        methods["small_lora"] = score_test(
            small, task, load_tokenizer(SMALL), params, "small_lora", size, trained.parameters
        )
    write_json(results(name, "reference.json"), {method: asdict(scored) for method, scored in methods.items()})


if __name__ == "__main__":
    run(main)
