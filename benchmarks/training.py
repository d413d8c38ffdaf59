"""Training throughput: calora's loop against plain PEFT + transformers Trainer in bf16, side by side in one run.

`python -m benchmarks.training [rounds]` after `make run` (it reads models/base and data/movies). Each round trains
20 steps of 16 texts with each; real tokens, not padding, are counted.
"""

from __future__ import annotations

import sys
import time

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from calora.adapters.lora import lora_config
from calora.distillation.distill import finetune
from calora.distillation.training import Schedule
from calora.models.loading import load_model, load_tokenizer
from calora.models.tasks import Example, encode_all
from stages.common import BASE
from stages.splits import read_split, read_task

STEPS, BATCH = 20, 16


def ours(examples: list[Example]) -> float:
    """Tokens a second of calora's loop."""
    model = load_model(BASE, torch.bfloat16, attention="eager")
    schedule = Schedule(STEPS, 5e-4, 2, 1.0, 0, 1e9)
    _, history = finetune(
        model, lora_config(32, 16, ["q_proj", "k_proj"]), examples, lambda: 0.0,
        batch_size=BATCH, schedule=schedule, seed=0,
    )  # fmt: skip
    return history.tokens / history.seconds


def plain(examples: list[Example]) -> float:
    """Tokens a second of PEFT and Trainer as their documentation shows them."""
    tokenizer = load_tokenizer(BASE)
    model = get_peft_model(
        load_model(BASE, torch.bfloat16), LoraConfig(r=32, lora_alpha=16, target_modules=["q_proj", "k_proj"])
    )
    rows = [
        {
            "input_ids": e.prompt_ids + e.answer_ids,
            "attention_mask": [1] * (e.tokens + 1),
            "labels": [-100] * len(e.prompt_ids) + e.answer_ids,
        }
        for e in examples[: STEPS * BATCH]
    ]
    arguments = TrainingArguments(
        ".cache/trainer", per_device_train_batch_size=BATCH, max_steps=STEPS, learning_rate=5e-4, bf16=False,
        use_cpu=True, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, train_dataset=Dataset.from_list(rows), data_collator=DataCollatorForSeq2Seq(tokenizer)
    )
    start = time.monotonic()
    trainer.train()
    return sum(e.tokens for e in examples[: STEPS * BATCH]) / (time.monotonic() - start)


def main() -> None:
    """Print both and their ratio, a round a line."""
    examples = encode_all(read_task("movies"), load_tokenizer(BASE), read_split("movies", "train"))
    for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else 3):
        a, b = ours(examples), plain(examples)
        print(f"calora {a:.0f} tokens/s, PEFT + Trainer {b:.0f} tokens/s, ratio {a / b:.2f}", flush=True)


if __name__ == "__main__":
    main()
