"""Peak memory where a base is larger than memory: compressing block by block, and training on packed layers.

`python -m benchmarks.larger` makes a random Llama-like model (0.4 GB in bf16) in a temporary folder, and takes each way in a
process of its own: what the process holds at its peak above what it held before it opened a model. No pipeline is needed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks import synthetic
from calora.adapters.lora import lora_config
from calora.common.files import bytes_on_disk
from calora.compressed import load
from calora.compression import compress
from calora.compression.streamed import open_streamed
from calora.compression.walk import Calibration
from calora.distillation.distill import finetune
from calora.distillation.training import Schedule
from calora.models.loading import load_model
from calora.saving import save

SIZE = synthetic.Size(hidden=1024, inner=2816, layers=16, heads=8, groups=4, vocabulary=16384)
RECIPE = [{"quantize": {"format": "int4", "group": 64, "embeddings": "int8"}}]
SCHEDULE = Schedule(2, 1e-4, 1, 1.0, eval_every=0, checkpoint_seconds=1e9)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
COMPRESSED = "compressed"  # where the streamed row writes, and the training rows read
Row = Callable[[Path, synthetic.Size], None]


def compressing(streamed: bool) -> Row:
    """Compress the model, as a whole in memory or block by block."""

    def row(folder: Path, size: synthetic.Size) -> None:
        base, out = folder / "base", folder / (COMPRESSED if streamed else "whole")
        model = open_streamed(base, torch.bfloat16) if streamed else load_model(base, torch.bfloat16)
        calibration = Calibration(synthetic.texts(4, 24, size.vocabulary), folder / f"unfinished-{out.name}")
        save(model, compress(model, RECIPE, calibration, torch.bfloat16), out, base)

    return row


def training(trainable: bool, recompute: bool = False, accumulation: int = 1) -> Row:
    """Train a LoRA on every layer of the compressed model for two steps of 4 texts."""

    def row(folder: Path, size: synthetic.Size) -> None:
        how = {"trainable": True} if trainable else {"dense": True}
        model = load(folder / COMPRESSED, attention="eager", dtype=torch.bfloat16, **how)  # type: ignore[arg-type]
        schedule = replace(SCHEDULE, gradient_checkpointing=recompute, accumulation=accumulation)
        examples = synthetic.texts(4, 24, size.vocabulary)
        finetune(model, lora_config(8, 16, TARGETS), examples, lambda: 0.0, batch_size=4, schedule=schedule, seed=0)

    return row


ROWS: dict[str, Row] = {
    "compress, the whole in memory": compressing(streamed=False),
    "compress, streamed": compressing(streamed=True),
    "train, dense view": training(trainable=False),
    "train, packed": training(trainable=True),
    "train, packed, gradient checkpointing": training(trainable=True, recompute=True),
    "train, packed, gradient checkpointing, 4 parts": training(trainable=True, recompute=True, accumulation=4),
}


def memory(what: str) -> float:
    """MB of this process: `VmRSS`, what it holds, or `VmHWM`, the most that it held since `forget_peak`."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(what)).split()[1]) / 1024


def forget_peak() -> None:
    """Let the peak begin anew (Linux)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def measured(name: str, folder: Path, size: synthetic.Size) -> float:
    """MB at the peak of a row above what this process held before."""
    warm = folder / "warm"
    tiny = synthetic.Size(64, 64, 1, 4, 2, 512)
    if not (warm / "base").exists():
        synthetic.make(warm / "base", tiny)
        compressing(streamed=True)(warm, tiny)
    ROWS[name](warm, tiny)  # what libraries load when they are first used is no model's
    forget_peak()
    before = memory("VmRSS")
    ROWS[name](folder, size)
    return memory("VmHWM") - before


def in_a_process(name: str, folder: Path, size: synthetic.Size) -> float:
    """`measured`, in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.larger",
        "--row",
        name,
        "--folder",
        str(folder),
        "--size",
        json.dumps(vars(size)),
    ]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return float(output.splitlines()[-1])


def main() -> None:
    """Every row, beside the bytes of the model, of a block and of the embeddings."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--row", choices=ROWS, help="this one alone, in this process")
    parser.add_argument("--folder", type=Path, help="with --row: where the model is")
    parser.add_argument("--size", type=json.loads, default=vars(SIZE), help="widths, as JSON")
    given = parser.parse_args()
    size = synthetic.Size(**given.size)
    if given.row:
        print(measured(given.row, given.folder, size))
        return
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        synthetic.make(folder / "base", size)
        block, table = 2 * size.block / 1e6, 2 * size.table / 1e6
        whole = bytes_on_disk(folder / "base") / 1e6
        print(f"model {whole:.0f} MB: {size.layers} blocks of {block:.1f} MB, embeddings {table:.0f} MB", flush=True)
        for name in ROWS:
            print(f"{name}: {in_a_process(name, folder, size):.0f} MB", flush=True)


if __name__ == "__main__":
    main()
