"""Train a fresh LoRA on the compressed base: what CA-LoRA is compared with.

`clm_lora` adapts every layer that CA-LoRA touches and has exactly as many trainable parameters; `clm_lora_qk` is the
paper's smaller baseline. Reads models/compressed/<recipe>, data/<task>; writes models/<method>/<task>/<recipe>.
"""

from __future__ import annotations

import torch
from peft import LoraConfig

from calora.adapters import check_targets, lora_config, write_adapter
from calora.artifacts import whole_directory, write_json
from calora.cards import plain_card
from calora.compressed import load
from calora.distillation import finetune
from calora.tasks import encode_all
from stages.common import adapter, compressed, run
from stages.config import Params
from stages.training import checkpoint, read_split, read_task, schedule, scorer


def main(params: Params, name: str, recipe: str, method: str) -> None:
    """One baseline adapter."""
    task = read_task(name)
    model = load(compressed(recipe), dense=True, attention="eager")
    config = config_of(params, method)
    check_targets(model, list(config.target_modules or []), "inherit.targets")
    examples = encode_all(task, model.calora_tokenizer, read_split(name, "train"))
    saved = checkpoint(params, method, name, recipe, [model.calora_fingerprint, str(config.to_dict())])
    trained, history = finetune(
        model, config, examples, scorer(model, task, model.calora_tokenizer, params),
        batch_size=params.train.batch_size, schedule=schedule(params), seed=params.seed,
        checkpoint=saved, title=f"{name} on {recipe}: {method}",
    )  # fmt: skip
    trained.meta = {
        "task": task.to_json(), "compressed_fingerprint": model.calora_fingerprint, "recipe": recipe, "recovery": False,
    }  # fmt: skip
    with whole_directory(adapter(method, name, recipe)) as scratch:
        write_adapter(
            scratch, trained, str(compressed(recipe)), plain_card(task, str(compressed(recipe))), torch.bfloat16
        )
        write_json(scratch / "history.json", history.to_json())
    saved.clear()


def config_of(params: Params, method: str) -> LoraConfig:
    """The LoRA of a baseline.

    Per layer CA-LoRA trains r_LoRA (in + out) on the inherited targets and r_bypass (in + out) on its own, so a LoRA
    of rank r_bypass, and of rank r_LoRA + r_bypass where both stand, has exactly its number of parameters.
    """
    teacher, own = params.teacher, params.inherit
    if method == "clm_lora_qk":
        return lora_config(teacher.rank, teacher.lora_alpha, teacher.targets)
    both = set(teacher.targets) & set(own.targets)
    wider = dict.fromkeys(sorted(both), teacher.rank + own.rank)
    wider |= dict.fromkeys(sorted(set(teacher.targets) - both), teacher.rank)
    alpha = teacher.lora_alpha / teacher.rank * own.rank
    return lora_config(own.rank, alpha, sorted({*own.targets, *teacher.targets}), wider)


if __name__ == "__main__":
    run(main)
