"""Train a LoRA on the small dense baseline. Reads models/small, data/<task>; writes models/small_lora/<task>."""

from __future__ import annotations

import torch

from calora.adapters.lora import lora_config
from calora.common.files import whole_directory, write_json
from calora.common.parallel import only_first_goes_on
from calora.models.anatomy import linear_layers
from calora.models.loading import load_model, load_tokenizer
from stages.common import SMALL, run, small_lora
from stages.config import Params
from stages.splits import has_labels, read_split, read_task
from stages.training import train_lora


def main(params: Params, name: str) -> None:
    """The small classifier of a task with labels and the same answers for every row; others have none (a note says so)."""
    task = read_task(name)
    lacks = "fixed answers" if not task.fixed else "" if has_labels(read_split(name, "train")) else "labels"
    if lacks:
        only_first_goes_on()
        with whole_directory(small_lora(name)) as scratch:
            write_json(
                scratch / "none.json", {"reason": f"the small baseline is a classifier; this task has no {lacks}"}
            )
        return
    torch.manual_seed(params.seed)  # the classification head's first weights
    model = load_model(SMALL, torch.float32, labels=len(task.answers))
    every = sorted(linear_layers(model))
    config = lora_config(params.teacher.rank, params.teacher.lora_alpha, every, classifier=True)
    train_lora(params, task, model, load_tokenizer(SMALL), config, small_lora(name), SMALL, torch.float32)


if __name__ == "__main__":
    run(main, trains=True)
