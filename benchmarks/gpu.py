"""On a GPU: is it the same as on a CPU, how fast is it, how much memory does it take; beside transformers, PEFT and bitsandbytes.

`python -m benchmarks.gpu` needs no network and no pipeline: it makes a random Llama-like model of 1.1 billion weights in a temporary
folder, checks parity on a tiny one, measures the rows below until its time is over (7.5 minutes), and writes docs/gpu.md. Where torch
sees no GPU it prints what it would write; `--tiny` takes a tiny model, so that all of it can be tried on a CPU.

Every row trains by the same loop: a LoRA of rank 8 on all linear layers, AdamW. All compute in bf16.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from benchmarks import synthetic
from calora.adapters.lora import inject, lora_config
from calora.common.devices import accelerated
from calora.common.files import bytes_on_disk, write_text
from calora.common.parallel import device
from calora.common.versions import versions
from calora.compressed import load
from calora.compression import compress
from calora.compression.streamed import open_streamed
from calora.compression.walk import Calibration
from calora.distillation.distill import trainable
from calora.distillation.loss import task_loss
from calora.distillation.parts import recomputing
from calora.models.families import family_of
from calora.models.loading import load_model, training_attention
from calora.saving import save

REAL = synthetic.Size(hidden=2048, inner=5632, layers=22, heads=32, groups=4, vocabulary=32000)
TINY = synthetic.Size(hidden=64, inner=128, layers=2, heads=4, groups=2, vocabulary=512)
RECIPES: dict[str, list[dict[str, Any]]] = {
    "int8": [{"quantize": {"format": "int8", "embeddings": "int8"}}],
    "int4": [{"quantize": {"format": "int4", "group": 64, "symmetric": False, "embeddings": "int8"}}],
    "int3": [{"quantize": {"format": "int3", "group": 64, "symmetric": False, "embeddings": "int8"}}],
    "nf4": [{"quantize": {"format": "nf4", "embeddings": "int8"}}],
    "2:4 int8": [
        {"prune": {"score": "wanda", "pattern": "2:4"}},
        {"quantize": {"format": "int8", "embeddings": "int8"}},
    ],
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK = 8
CLOSE = 0.02  # of the norm: bf16 products that are summed in another order
NEEDED = 60.0  # seconds that a row may take: none begins with less left


@dataclass(frozen=True)
class Work:
    """How much is measured: texts a batch, tokens a text, training steps, tokens that are decoded."""

    batch: int
    tokens: int
    steps: int
    new: int


def opened_by_calora(folder: Path, **how: Any) -> Any:
    """A compressed model as calora opens it."""
    return load(folder, device=str(device()), dtype=torch.bfloat16, attention=training_attention(), **how)


def opened_by_transformers(folder: Path, quantized: dict[str, Any] | None = None) -> Any:
    """The base as transformers opens it, quantised by bitsandbytes or not."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {"quantization_config": BitsAndBytesConfig(**quantized)} if quantized else {}
    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16,
        device_map={"": str(device())},
        attn_implementation=training_attention(),
        **options,
    ).eval()


NF4 = {
    "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": torch.bfloat16,
}  # fmt: skip
Row = tuple[str, Callable[[Path], Any], bool]  # name, folder of all models -> model, whether blocks are recomputed


def rows() -> list[Row]:
    """What is measured, the most telling first."""
    packed = {name: partial(_packed, name) for name in RECIPES}
    return [
        ("transformers + PEFT, bf16", lambda root: opened_by_transformers(root / "base"), False),
        ("transformers + PEFT + bitsandbytes nf4", lambda root: opened_by_transformers(root / "base", NF4), False),
        ("calora, int4, packed", packed["int4"], False),
        ("calora, int4, dense view", lambda root: opened_by_calora(root / "int4", dense=True), False),
        ("calora, nf4, packed", packed["nf4"], False),
        ("calora, int8, packed", packed["int8"], False),
        (
            "transformers + PEFT + bitsandbytes int8",
            lambda root: opened_by_transformers(root / "base", {"load_in_8bit": True}),
            False,
        ),
        ("calora, int3, packed", packed["int3"], False),
        ("calora, int4, packed, gradient checkpointing", packed["int4"], True),
        ("transformers + PEFT, bf16, gradient checkpointing", lambda root: opened_by_transformers(root / "base"), True),
        ("calora, 2:4 int8, packed", packed["2:4 int8"], False),
    ]


def _packed(name: str, root: Path) -> Any:
    return opened_by_calora(root / name, trainable=True)


def wait() -> None:
    """Until the GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(work: Callable[[], Any]) -> float:
    """How long something takes, the GPU's share included."""
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


@contextmanager
def peak() -> Iterator[list[float]]:
    """The most memory that was given out on the GPU meanwhile, MB, once the block is over; none on a CPU."""
    found: list[float] = []
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    yield found
    if torch.cuda.is_available():
        found.append(torch.cuda.max_memory_allocated() / 1e6)


def training_step(model: Any, examples: list[Any], optimizer: torch.optim.Optimizer) -> Tensor:
    """One step on the answers' tokens; its loss."""
    family = family_of(model)
    batch = family.collate(examples, model)
    loss = task_loss(family.forward(model, batch, None), batch)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def ready_to_train(model: Any) -> torch.optim.Optimizer:
    """A LoRA on all linear layers, and its optimiser."""
    torch.manual_seed(0)
    inject(model, lora_config(RANK, 2 * RANK, TARGETS))
    parameters = trainable(model)
    for parameter in parameters:
        parameter.data = parameter.data.to(torch.bfloat16)
        parameter.requires_grad_()
    return torch.optim.AdamW(parameters, lr=1e-4, fused=True)


def measured(row: Row, root: Path, size: synthetic.Size, work: Work) -> list[str]:
    """Cells of one row: tokens a second of training, prefill and decoding, and MB at the peak of training and of decoding."""
    _, opened, recompute = row
    examples = synthetic.texts(work.batch, work.tokens, size.vocabulary)
    ids = torch.tensor([example.prompt_ids for example in examples], device=device())
    model = opened(root)
    with torch.no_grad(), peak() as served:
        model(ids[:1])
        prefill = seconds(lambda: model(ids))
        options = {"do_sample": False, "min_new_tokens": work.new, "max_new_tokens": work.new, "pad_token_id": 0}
        decode = seconds(lambda: model.generate(ids[:1], attention_mask=torch.ones_like(ids[:1]), **options))
    optimizer = ready_to_train(model)
    with peak() as trained, recomputing(model, recompute):
        training_step(model, examples, optimizer)
        took = seconds(lambda: [training_step(model, examples, optimizer) for _ in range(work.steps)])
    tokens = work.batch * work.tokens
    rates = [tokens * work.steps / took, tokens / prefill, work.new / decode]
    return [*(f"{rate:,.0f}" for rate in rates), *(f"{found[0]:,.0f}" if found else "" for found in (trained, served))]


def parity(root: Path) -> list[tuple[str, float, float]]:
    """(what, relative difference, the most that it may be), of a tiny model on this device and on a CPU."""
    synthetic.make(root / "base", TINY, seed=1)
    calibration, found = synthetic.texts(4, 12, TINY.vocabulary), []
    ids = torch.tensor([example.prompt_ids for example in calibration])
    for name, recipe in RECIPES.items():
        folders = {}
        for where, target in (("cpu", torch.device("cpu")), ("here", device())):
            model = open_streamed(root / "base", torch.bfloat16, target)
            report = compress(model, recipe, Calibration(calibration, root / f"{name}-{where}"), torch.bfloat16)
            folders[where] = root / f"{name} {where}"
            save(model, report, folders[where], root / "base")
        cpu = load(folders["cpu"], dense=True, dtype=torch.float32)
        with torch.no_grad():
            expected = cpu(ids).logits
            for how in ({}, {"dense": True}, {"trainable": True}):
                model = load(folders["cpu"], device=str(device()), dtype=torch.float32, **how)  # type: ignore[arg-type]
                title = f"{name}: logits, {next(iter(how), 'packed')}"
                found.append((title, differs(model(ids.to(device())).logits, expected), CLOSE))
            model = load(folders["here"], dense=True, dtype=torch.float32)
            found.append((f"{name}: compressed here, logits", differs(model(ids).logits, expected), 5 * CLOSE))
        found.append((f"{name}: gradients on packed layers", *gradients(folders["cpu"])))
    plain: Any = load_model(root / "base", torch.float32, attention="sdpa")
    with torch.no_grad():
        expected = load_model(root / "base", torch.float32, attention="eager")(ids).logits
        found.append(("attention: sdpa", differs(plain.to(device())(ids.to(device())).logits, expected), 1e-3))
    return found


def gradients(folder: Path) -> tuple[float, float]:
    """Relative difference of a LoRA's gradients on packed layers to those on their dense view; equal to the bit but for a head."""
    found = []
    for how in ({"dense": True}, {"trainable": True}):
        model = opened_by_calora(folder, **how)
        ready_to_train(model)
        examples = synthetic.texts(4, 12, TINY.vocabulary)
        batch = family_of(model).collate(examples, model)
        task_loss(family_of(model).forward(model, batch, None), batch).backward()
        found.append(torch.cat([p.grad.flatten().float() for p in trainable(model) if p.grad is not None]))
    return differs(found[1], found[0]), 1e-3


def differs(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||."""
    return float((found.detach().cpu().float() - expected.detach().cpu().float()).norm() / expected.float().norm())


def report(size: synthetic.Size, work: Work, limit: float) -> str:
    """All of it, as a page."""
    start = time.perf_counter()
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    with TemporaryDirectory() as scratch:
        root = Path(scratch)
        same = parity(root / "parity")
        print("\n".join(f"{what}: {value:.2g} (at most {most})" for what, value, most in same), flush=True)
        synthetic.make(root / "base", size)
        sizes, lines = [f"| base | {bytes_on_disk(root / 'base') / 1e6:,.0f} | |"], []
        for recipe, steps in RECIPES.items():
            took = seconds(partial(made, root, recipe, steps, size))
            sizes.append(f"| {recipe} | {bytes_on_disk(root / recipe) / 1e6:,.0f} | {took:.0f} |")
        for row in rows():
            left = limit - (time.perf_counter() - start)
            if left < NEEDED:
                lines.append(f"| {row[0]} | not measured: the time was over | | | | |")
                continue
            try:
                cells = measured(row, root, size, work)
            except Exception as error:  # one row that fails, whatever its library raises, leaves the others
                cells = [f"failed: {type(error).__name__}: {str(error).splitlines()[0][:120]}", "", "", "", ""]
            lines.append(f"| {row[0]} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    wrong = [what for what, value, most in same if not value <= most]
    libraries = ", ".join(f"{library} {version}" for library, version in versions().items())
    return "\n".join([
        "# On a GPU", "", "Written by `python -m benchmarks.gpu`.", "",
        f"{name}; {libraries}; CUDA {torch.version.cuda}. A random Llama-like model, hidden {size.hidden}, feed-forward {size.inner}, "
        f"{size.layers} blocks, vocabulary {size.vocabulary}; {work.batch} texts of {work.tokens} tokens; seed 0; bf16; "
        f"{time.perf_counter() - start:.0f} s in all.", "",
        "Tokens a second; MB that were given out on the GPU at the peak of training and of decoding.", "",
        "| | training | prefill | decoding, 1 text | MB, training | MB, decoding |", "|---|---:|---:|---:|---:|---:|", *lines, "",
        "Compressing, block by block:", "", "| recipe | MB on disk | seconds |", "|---|---:|---:|", *sizes, "",
        f"Parity with a CPU on a tiny model: {len(same) - len(wrong)} of {len(same)} within bounds"
        + (f"; not {', '.join(wrong)}." if wrong else "."), "",
        "| | relative difference | at most |", "|---|---:|---:|",
        *(f"| {what} | {value:.2g} | {most} |" for what, value, most in same), "",
    ])  # fmt: skip


def made(root: Path, recipe: str, steps: list[dict[str, Any]], size: synthetic.Size) -> None:
    """Compress the base by a recipe."""
    model = open_streamed(root / "base", torch.bfloat16, device())
    calibration = Calibration(synthetic.texts(8, 64, size.vocabulary), root / f"unfinished {recipe}")
    save(model, compress(model, steps, calibration, torch.bfloat16), root / recipe, root / "base")


def main() -> None:
    """Measure, print, and on a GPU write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a tiny model, few tokens")
    parser.add_argument("--seconds", type=float, default=450, help="no row begins with less than a minute of them left")
    parser.add_argument("--out", type=Path, help="the page; by default docs/gpu.md where a GPU computed")
    given = parser.parse_args()
    size, work = (TINY, Work(2, 8, 1, 2)) if given.tiny else (REAL, Work(8, 256, 5, 32))
    page = report(size, work, given.seconds)
    out = given.out or (Path("docs/gpu.md") if accelerated() and not given.tiny else None)
    print(page)
    if out:
        write_text(out, page)


if __name__ == "__main__":
    main()
