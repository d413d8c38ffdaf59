"""Peak memory of distilling CA-LoRA against that of training a LoRA on the uncompressed base, each in its own process.

`python -m benchmarks.memory` after `make run` (it reads models/ and data/movies). Each trains 10 steps on the longest
texts of each split, where a training peaks; the peak is the largest resident set of the process.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from stages.baseline import config_of

from calora.adapters.folder import read_adapter
from calora.adapters.lora import lora_config
from calora.compressed import load
from calora.distillation.distill import distill, finetune
from calora.distillation.targets import Target, Targets
from calora.distillation.training import Schedule
from calora.models.loading import load_model, load_tokenizer
from calora.models.tasks import Example, encode_all
from stages.common import BASE, adapter, compressed, targets
from stages.config import load_params
from stages.distill import weights
from stages.splits import read_split, read_task

TASK, RECIPE = "movies", "q8_up"
METHODS = {
    "lora_qk": "LoRA (q, k) on the uncompressed base",
    "lora": "LoRA (equal budget) on the uncompressed base",
    "distill": "CA-LoRA on the compressed base",
}


class Chosen(Targets):
    """The stored targets of some texts: index i here is the text `places[i]` there."""

    def __init__(self, directory: Path, places: list[int]) -> None:
        super().__init__(directory)
        self.places = places

    def with_answers(self, examples: Sequence[Example]) -> list[Example]:
        return list(examples)

    def read(self, indices: Sequence[int], device: torch.device) -> Target:
        return super().read([self.places[i] for i in indices], device)


def train(method: str) -> float:
    """MB of this process at its peak, after training on the longest texts by `method`."""
    params, task = load_params(), read_task(TASK)
    tokenizer, size = load_tokenizer(BASE), params.train.batch_size
    pools = {}
    for split in ("train", "unlabelled"):
        examples = encode_all(task, tokenizer, read_split(TASK, split))
        places = sorted(range(len(examples)), key=lambda i: -examples[i].tokens)[: 5 * size]
        pools[split] = ([examples[i] for i in places], places)
    schedule = Schedule(10, 5e-4, 2, 1.0, eval_every=0, checkpoint_seconds=1e9)
    options = {"batch_size": size, "schedule": schedule, "seed": 0, "title": method}
    if method == "distill":
        model = load(compressed(RECIPE), dense=True, attention="eager")
        stored = [(chosen, Chosen(targets(TASK) / split, places)) for split, (chosen, places) in pools.items()]
        inherited = read_adapter(adapter("inherited", TASK, RECIPE))
        distill(model, inherited, *stored, lambda: 0.0, weights(params), **options)
    else:
        model = load_model(BASE, torch.bfloat16, attention="eager")
        config = config_of(params, "clm_lora") if method == "lora" else lora_config(32, 16, ["q_proj", "k_proj"])
        finetune(model, config, pools["train"][0], lambda: 0.0, **options)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Each method in a process of its own, and the ratios."""
    if len(sys.argv) > 1:
        print(train(sys.argv[1]))
        return
    peaks = {}
    for method, name in METHODS.items():
        command = [sys.executable, "-m", "benchmarks.memory", method]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        peaks[method] = float(output.splitlines()[-1])
        print(f"{name}: {peaks[method]:.0f} MB", flush=True)
    print(f"distill / LoRA (q, k): {peaks['distill'] / peaks['lora_qk']:.2f}")
    print(f"distill / LoRA (equal budget): {peaks['distill'] / peaks['lora']:.2f}")


if __name__ == "__main__":
    main()
