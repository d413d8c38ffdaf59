"""MoEfication: accuracy against the share of experts that a token uses, of a ReLU model and of the SwiGLU base.

`python -m benchmarks.experts relu` trains a small T5 with ReLU feed-forwards on the four embedded corpora (a minute or two)
and MoEfies it; `python -m benchmarks.experts swiglu` MoEfies models/base under the teacher's LoRA. Both after `make run`, with
`tasks: [movies, tweets, amazon, nyt]` for the first. Nothing is trained after the split.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

from calora.adapters import attach_adapter, read_plain_lora, set_active
from calora.batching import epoch_batches
from calora.compression import Calibration, compress
from calora.evaluate import correct, predict
from calora.inheritance import carry_lora
from calora.models import family_of, load_model, load_tokenizer
from calora.origin import Origin
from calora.progress import progress
from calora.tasks import Example, Task, encode_all, read_rows
from stages.common import BASE, SMALL, teacher
from stages.splits import read_split, read_task

CORPORA = ("movies", "tweets", "amazon", "nyt")
SHARES = {8: (0.3, 0.5, 0.7, 0.8, 0.9), 0: (0.5, 0.7, 0.9)}  # shared experts -> shares of all 48 that a token uses
STEPS, BATCH, LR = 1200, 32, 1e-3


def accuracy(model: Any, task: Task, tokenizer: Any, examples: list[Example]) -> float:
    """Share of right answers."""
    hits = correct(predict(model, task, tokenizer, examples, 32), examples)
    return sum(hits) / len(hits)


def small_relu(task: Task, tokenizer: Any, examples: list[Example]) -> Any:
    """A T5 of 4 + 1 blocks, d = 192, 1024 ReLU neurons a block, trained from nothing to name the sentiment."""
    torch.manual_seed(0)
    model: Any = T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(tokenizer), d_model=192, d_kv=32, d_ff=1024, num_layers=4, num_decoder_layers=1, num_heads=6,
            feed_forward_proj="relu", decoder_start_token_id=0, pad_token_id=0, eos_token_id=102, dropout_rate=0.1,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01)
    family, ids = family_of(model), torch.tensor(task.answer_token_ids(tokenizer))
    plan = epoch_batches([e.tokens for e in examples], BATCH, STEPS, 0)
    model.train()
    for step, batch in enumerate(progress(plan, "training the ReLU model", "steps")):
        chosen = [examples[i] for i in batch]
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1.0, (step + 1) / 100) * (1 - step / STEPS)
        output = family.forward(model, family.collate(chosen, model), ids)
        loss = F.cross_entropy(output.logits, torch.tensor([e.label for e in chosen]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


def relu() -> None:
    """The ReLU model dense, and at each share of its experts."""
    tokenizer: Any = AutoTokenizer.from_pretrained(SMALL)
    task = Task("sentiment", "{text}", ("negative", "positive"), 128, 1)
    rows = {
        split: [
            row for corpus in CORPORA for row in read_rows(Path("data") / corpus / f"{split}.jsonl", "run make run")
        ]
        for split in ("train", "test")
    }
    train, test = (encode_all(task, tokenizer, rows[split]) for split in ("train", "test"))
    model = small_relu(task, tokenizer, train)
    whole = accuracy(model, task, tokenizer, test)
    active = neurons_on(model, task, test)
    silent = copy.deepcopy(model)
    for name, layer in silent.named_modules():
        if name.endswith(".wo"):
            layer.weight.zero_()
    print(f"ReLU model, dense: {whole:.3f} on {len(test)} test texts; {active:.1%} of its neurons are on for a token")
    print(f"without any feed-forward: {accuracy(silent, task, tokenizer, test):.3f}", flush=True)
    for clustering, router in (("coactivation", "learned"), ("coactivation", "analytic"), ("parameters", "learned")):
        for part in (0.1, 0.2, 0.3, 0.5):
            split = copy.deepcopy(model)
            options = {"experts": 64, "active": part, "clustering": clustering, "router": router}
            report = compress(split, [{"moefy": options}], Calibration(train[:512]))
            found = accuracy(split, task, tokenizer, test)
            print(
                f"{clustering}, {router}, {part:.0%} of 64 experts: {found:.3f} ({found - whole:+.3f}); {energies(report)}",
                flush=True,
            )


def neurons_on(model: Any, task: Task, examples: list[Example]) -> float:
    """Share of neurons above 0, over real tokens of some texts."""
    shares: list[float] = []
    handles = [
        module.register_forward_pre_hook(lambda _, args: shares.append(float((args[0] > 0).float().mean())))
        for name, module in model.named_modules()
        if name.endswith(".wo")
    ]
    family = family_of(model)
    with torch.no_grad():
        for example in examples[:64]:
            family.forward(model, family.collate([Example(example.prompt_ids)], model), None)
    for handle in handles:
        handle.remove()
    return sum(shares) / len(shares)


def energies(report: dict[str, Any]) -> str:
    """Mean share of the output energy that the chosen experts hold, and that the best choice would."""
    notes = [entry["steps"]["moefy"] for entry in report["layers"].values() if entry["kind"] == "experts"]
    found, best = (sum(note[key] for note in notes) / len(notes) for key in ("energy", "energy_of_the_best"))
    return f"output energy {found:.3f}, best choice {best:.3f}"


def swiglu() -> None:
    """The base with the teacher's LoRA, dense and at each share of its experts, on the validation split of movies."""
    task, tokenizer = read_task("movies"), load_tokenizer(BASE)
    origin = read_plain_lora(teacher("movies"))
    examples = encode_all(task, tokenizer, read_split("movies", "validation"))
    calibration = [
        Example(tokenizer(row["text"]).input_ids) for row in read_rows(Path("data/calibration/texts.jsonl"), "")
    ]

    def scored(options: dict[str, Any] | None) -> tuple[float, str]:
        model = load_model(BASE, torch.bfloat16, attention="eager")
        report = (
            compress(model, [{"moefy": options}], Calibration(calibration))
            if options
            else {"kept": {}, "layers_kept": {}}
        )
        lora, _ = carry_lora(model, origin, Origin(report["kept"], report["layers_kept"]))
        attach_adapter(model, lora, "a")
        set_active(model, "a")
        return accuracy(model, task, tokenizer, examples), energies(report) if options else ""

    whole, _ = scored(None)
    print(f"LLM + LoRA, dense: {whole:.3f} on {len(examples)} validation texts of movies")
    for shared, parts in SHARES.items():
        for part in parts:
            options = {
                "experts": 48,
                "shared": shared,
                "active": part,
                "clustering": "coactivation",
                "router": "learned",
            }
            found, told = scored(options)
            print(
                f"{part:.0%} of 48 experts, {shared} of them shared: {found:.3f} ({found - whole:+.3f}); {told}",
                flush=True,
            )


if __name__ == "__main__":
    {"relu": relu, "swiglu": swiglu}[sys.argv[1]]()
