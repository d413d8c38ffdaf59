"""MoEfication: quality against the share of experts that a token uses, of a ReLU model and of the SwiGLU base.

`python -m benchmarks.experts relu` trains a small language model with ReLU feed-forwards on the texts of the embedded
corpora (six minutes; they are downloaded if need be) and MoEfies it; `python -m benchmarks.experts swiglu`, after `make run`,
MoEfies models/base under the teacher's LoRA. Nothing is trained after the split. A row without any feed-forward tells how
much there is to lose.
"""

from __future__ import annotations

import copy
import math
import sys
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import PhiConfig, PhiForCausalLM

from calora.adapters.folder import read_plain_lora
from calora.adapters.lora import attach_adapter, set_active
from calora.adapters.origin import Origin
from calora.common.batching import epoch_batches, length_batches
from calora.common.progress import progress
from calora.compression import compress
from calora.compression.walk import Calibration
from calora.evaluation.predict import score
from calora.inheritance.inherit import carry_lora
from calora.layers.report import Report
from calora.models.families import pad
from calora.models.loading import load_model, load_tokenizer
from calora.models.tasks import Example, encode_all
from stages.common import BASE, teacher
from stages.config import Scores, load_params
from stages.corpora import split_pools, task_of
from stages.splits import read_calibration, read_split, read_task

SHARES = {8: (0.3, 0.5, 0.7, 0.8, 0.9), 0: (0.5, 0.7, 0.9)}  # shared experts -> shares of all 48 that a token uses
STEPS, BATCH, LR, VOCABULARY, TOKENS = 900, 48, 2e-3, 4096, 64
HELD_BACK, CALIBRATED = 1500, 512  # texts


def corpus() -> dict[str, list[list[int]]]:
    """Token ids of the training and test texts of every embedded corpus, by a byte-level BPE of the training texts."""
    params = load_params()
    texts: dict[str, list[str]] = {"train": [], "test": []}
    for name, source in params.data.sets.items():
        if isinstance(source, Scores):
            pools = split_pools(params, source, task_of(name, source))
            for split, own in texts.items():
                own += [row["text"] for row in pools[split]]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<end>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts["train"], trainer)
    return {
        split: [[0, *encoded.ids[: TOKENS - 2], 0] for encoded in tokenizer.encode_batch(own)]
        for split, own in texts.items()
    }


def small_relu(texts: list[list[int]]) -> Any:
    """A Phi of 4 blocks, d = 256, 1024 ReLU neurons a block, trained from nothing to predict the next token."""
    torch.manual_seed(0)
    model: Any = PhiForCausalLM(
        PhiConfig(
            vocab_size=VOCABULARY, hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
            hidden_act="relu", max_position_embeddings=TOKENS, resid_pdrop=0.1, embd_pdrop=0.1, tie_word_embeddings=True,
            pad_token_id=0, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.05, betas=(0.9, 0.98))
    plan = epoch_batches([len(ids) for ids in texts], BATCH, STEPS, 0)
    model.train()
    for step, batch in enumerate(progress(plan, "training the ReLU model", "steps")):
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1.0, (step + 1) / 100) * (1 - step / STEPS)
        loss = F.cross_entropy(*predictions(model, [texts[i] for i in batch]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval().requires_grad_(False)


def predictions(model: Any, texts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [P, V] and the tokens [P] that they should name, of every token but the first of each text."""
    ids, mask = pad(texts, 0)
    logits = model(input_ids=ids, use_cache=False).logits
    return logits[:, :-1][mask[:, 1:]], ids[:, 1:][mask[:, 1:]]


def next_token(model: Any, texts: list[list[int]]) -> tuple[float, float, int]:
    """Share of next tokens that the model names, its perplexity, and how many tokens there were."""
    hits = tokens = 0
    loss = 0.0
    with torch.no_grad():
        for indices in length_batches([len(ids) for ids in texts], BATCH):
            logits, labels = predictions(model, [texts[i] for i in indices])
            hits += int((logits.argmax(-1) == labels).sum())
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
            tokens += len(labels)
    return hits / tokens, math.exp(loss / tokens), tokens


def relu() -> None:
    """The ReLU model dense, without its feed-forwards, and at each share of its experts."""
    texts = corpus()
    model, test = small_relu(texts["train"]), texts["test"][:HELD_BACK]
    whole, perplexity, tokens = next_token(model, test)
    silent = copy.deepcopy(model)
    for block in silent.model.layers:
        block.mlp.fc2.weight.zero_()
    without, least, _ = next_token(silent, test)
    print(f"{tokens} tokens of {len(test)} test texts; {neurons_on(model, test):.1%} of the neurons are on for a token")
    print(f"dense: next token {whole:.4f}, perplexity {perplexity:.1f}")
    print(f"without any feed-forward: {without:.4f} ({without - whole:+.4f}), {least:.1f}", flush=True)
    calibration = Calibration([Example(ids) for ids in texts["train"][:CALIBRATED]])
    learned = [(experts, "coactivation", "learned") for experts in (32, 64, 128)]
    for experts, clustering, router in (*learned, (128, "coactivation", "analytic"), (128, "parameters", "learned")):
        for part in (0.1, 0.2, 0.3):
            split = copy.deepcopy(model)
            options = {"experts": experts, "active": part, "clustering": clustering, "router": router}
            report = compress(split, [{"moefy": options}], calibration)
            found, perplexity, _ = next_token(split, test)
            print(
                f"{clustering}, {router}, {part:.0%} of {experts} experts: {found:.4f} ({found - whole:+.4f}), "
                f"{perplexity:.1f}; {energies(report)}",
                flush=True,
            )


def neurons_on(model: Any, texts: list[list[int]]) -> float:
    """Share of neurons above 0, over the tokens of some texts."""
    shares: list[float] = []
    handles = [
        block.mlp.fc2.register_forward_pre_hook(lambda _, args: shares.append(float((args[0] > 0).float().mean())))
        for block in model.model.layers
    ]
    with torch.no_grad():
        for ids in texts[:64]:
            predictions(model, [ids])
    for handle in handles:
        handle.remove()
    return sum(shares) / len(shares)


def energies(report: Report) -> str:
    """Mean share of the output energy that the chosen experts hold, and that the best choice would."""
    notes = [entry["steps"]["moefy"] for entry in report.layers.values() if entry["kind"] == "experts"]
    found, best = (sum(note[key] for note in notes) / len(notes) for key in ("energy", "energy_of_the_best"))
    return f"output energy {found:.3f}, best choice {best:.3f}"


def swiglu() -> None:
    """The base with the teacher's LoRA, dense and at each share of its experts, on the validation split of movies."""
    task, tokenizer = read_task("movies"), load_tokenizer(BASE)
    origin = read_plain_lora(teacher("movies"))
    examples = encode_all(task, tokenizer, read_split("movies", "validation"))
    calibration = read_calibration(tokenizer)

    def scored(options: dict[str, Any] | None, silent: bool = False) -> tuple[float, str]:
        model = load_model(BASE, torch.bfloat16, attention="eager")
        report = compress(model, [{"moefy": options}], Calibration(calibration)) if options else None
        lora, _ = carry_lora(model, origin, Origin(report.kept, report.layers_kept) if report else Origin())
        attach_adapter(model, lora, "a")
        set_active(model, "a")
        if silent:
            for block in model.model.layers:
                block.mlp.down_proj.weight.zero_()
        return score(model, task, tokenizer, examples, 32), energies(report) if report else ""

    whole, _ = scored(None)
    print(f"LLM + LoRA, dense: {whole:.3f} on {len(examples)} validation texts of movies")
    print(f"without any feed-forward: {scored(None, silent=True)[0]:.3f}", flush=True)
    for shared, parts in SHARES.items():
        kept = []
        for part in parts:
            options = {
                "experts": 48,
                "shared": shared,
                "active": part,
                "clustering": "coactivation",
                "router": "learned",
            }
            found, told = scored(options)
            kept += [part] if found >= whole - 0.02 else []
            print(
                f"{part:.0%} of 48 experts, {shared} of them shared: {found:.3f} ({found - whole:+.3f}); {told}",
                flush=True,
            )
        least = f"{min(kept):.0%}" if kept else f"more than {max(parts):.0%}"
        print(f"{shared} shared: at most 2 points are lost from {least} of the experts on", flush=True)


if __name__ == "__main__":
    {"relu": relu, "swiglu": swiglu}[sys.argv[1]]()
