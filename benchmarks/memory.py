"""Peak memory of distilling CA-LoRA against that of training a LoRA on the uncompressed base, each in its own process.

`python -m benchmarks.memory` after `make run` (it reads models/ and data/movies). Each trains 10 steps on the longest
texts of each split, where a training peaks; the peak is the largest resident set of the process.
"""

from __future__ import annotations

import resource
import subprocess
import sys

from calora.adapters.folder import read_adapter
from calora.adapters.lora import lora_config
from calora.common.files import read_json
from calora.compressed import load
from calora.distillation.distill import Pool, distill, finetune
from calora.distillation.targets import Targets
from calora.distillation.training import Schedule
from calora.inheritance.fresh import equal_budget
from calora.models.anatomy import linear_layers
from calora.models.loading import load_model, load_tokenizer, training_attention
from calora.models.tasks import encode_all
from stages.common import BASE, METHODS, compressed, inherited, targets
from stages.config import load_params
from stages.distill import weights
from stages.splits import read_split, read_task

TASK, RECIPE = "movies", "q8_up"
ROWS = {
    "lora_qk": "LoRA (q, k) on the uncompressed base",
    "lora": "LoRA (equal budget) on the uncompressed base",
    "distill": "CA-LoRA on the compressed base",
}
SCHEDULE = Schedule(10, 5e-4, 2, 1.0, eval_every=0, checkpoint_seconds=1e9)


def longest(split: str, count: int) -> Pool:
    """The longest texts of a split, with the teacher's targets."""
    examples = encode_all(read_task(TASK), load_tokenizer(BASE), read_split(TASK, split))
    places = sorted(range(len(examples)), key=lambda i: -examples[i].tokens)[:count]
    return Pool(examples, Targets(targets(TASK) / split)).take(places)


def train(row: str) -> float:
    """MB of this process at its peak, after training on the longest texts."""
    size = load_params().train.batch_size
    labelled, unlabelled = longest("train", 5 * size), longest("unlabelled", 5 * size)
    start = read_adapter(inherited(TASK, RECIPE) / "calora")
    if row == "distill":
        model = load(compressed(RECIPE), dense=True, attention=training_attention())
        loss = read_json(METHODS / "calora/loss.json", "run `make run`")
        distill(
            model, start, labelled, unlabelled, lambda: 0.0, weights(loss), batch_size=size, schedule=SCHEDULE, seed=0, title=row
        )  # fmt: skip
    else:
        base = load_model(BASE, attention=training_attention())
        config = (
            equal_budget(start, linear_layers(base)) if row == "lora" else lora_config(32, 16, ["q_proj", "k_proj"])
        )
        finetune(base, config, labelled.examples, lambda: 0.0, batch_size=size, schedule=SCHEDULE, seed=0, title=row)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Each row in a process of its own, and the ratios."""
    if len(sys.argv) > 1:
        print(train(sys.argv[1]))
        return
    peaks = {}
    for row, name in ROWS.items():
        command = [sys.executable, "-m", "benchmarks.memory", row]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        peaks[row] = float(output.splitlines()[-1])
        print(f"{name}: {peaks[row]:.0f} MB", flush=True)
    print(f"distill / LoRA (q, k): {peaks['distill'] / peaks['lora_qk']:.2f}")
    print(f"distill / LoRA (equal budget): {peaks['distill'] / peaks['lora']:.2f}")


if __name__ == "__main__":
    main()
