"""Train a LoRA on the small dense baseline. Reads models/small, data/<task>; writes models/small_lora/<task>."""

from __future__ import annotations

import torch

from calora.adapters import lora_config, write_adapter
from calora.artifacts import fingerprint, whole_directory, write_json
from calora.cards import plain_card
from calora.distillation import finetune
from calora.models import load_model, load_tokenizer
from calora.tasks import encode_all
from stages.common import SMALL, run
from stages.common import adapter as adapter_path
from stages.config import Params
from stages.training import checkpoint, read_split, read_task, schedule, scorer

TARGETS = ["query", "value"]  # BERT's names; PEFT's usual choice for it


def main(params: Params, name: str) -> None:
    """A scored task's small classifier; a generated task has none (an empty folder says so)."""
    task, tokenizer = read_task(name), load_tokenizer(SMALL)
    out = adapter_path("small_lora", name, "")
    if not task.scored:
        with whole_directory(out) as scratch:
            write_json(scratch / "none.json", {"reason": "the small baseline is a classifier; this task is generated"})
        return
    torch.manual_seed(params.seed)
    model = load_model(SMALL, torch.float32, labels=len(task.answers))
    config = lora_config(params.teacher.rank, params.teacher.lora_alpha, TARGETS, classifier=True)
    saved = checkpoint(params, "small_lora", name, [fingerprint(SMALL), params.teacher.model_dump_json()])
    trained, history = finetune(
        model, config, encode_all(task, tokenizer, read_split(name, "train")), scorer(model, task, tokenizer, params),
        batch_size=params.train.batch_size, schedule=schedule(params), seed=params.seed,
        checkpoint=saved, title=f"{name}: small",
    )  # fmt: skip
    with whole_directory(out) as scratch:
        write_adapter(scratch, trained, str(SMALL), plain_card(task, str(SMALL)), torch.float32)
        write_json(scratch / "history.json", history.to_json())
    saved.clear()


if __name__ == "__main__":
    run(main)
