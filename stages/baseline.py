"""Train a fresh LoRA on the compressed base: what CA-LoRA is compared with.

`clm_lora` adapts every layer that CA-LoRA touches and has exactly as many trainable parameters; `clm_lora_qk` is the
paper's smaller baseline. Reads models/compressed/<recipe>, data/<task>; writes models/<method>/<task>/<recipe>.
"""

from __future__ import annotations

from peft import LoraConfig

from calora.adapters.lora import check_targets, lora_config
from calora.compressed import load
from stages.common import adapter, compressed, run
from stages.config import Params
from stages.splits import read_task
from stages.training import train_lora


def main(params: Params, name: str, recipe: str, method: str) -> None:
    """One baseline adapter."""
    task = read_task(name)
    model = load(compressed(recipe), dense=True, attention="eager")
    config = config_of(params, method)
    check_targets(model, list(config.target_modules or []), config.r)
    meta = {
        "task": task.to_json(), "compressed_fingerprint": model.calora_fingerprint, "recipe": recipe,
    }  # fmt: skip
    folder, base = adapter(method, name, recipe), compressed(recipe)
    train_lora(
        params, task, model, model.calora_tokenizer, config, folder, base, model.calora_fingerprint, meta
    ).clear()


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
    run(main, trains=True)
