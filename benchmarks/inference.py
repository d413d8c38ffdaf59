"""Speed and memory of the packed models with and without adapter, beside bf16 dense + PEFT, in one run.

`python -m benchmarks.inference [recipe ...]` after `make run` (it reads models/base; recipes that are not in
models/compressed are compressed into .cache/benchmarks first). Each row is a process of its own, so that its peak is its
own; the rounds go through all rows in turn, and the best of each is shown. Adapters, whose values do not change their speed:
a LoRA of rank 8 on all seven linear layers, the same with a linear bypass of rank 4 beside each (CA-LoRA), and a plain LoRA
of rank 12, which has as many parameters. `DENSE_TUNED` is the base with calora's switch for single tokens: what of a recipe's
speed is due to the switch alone.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROUNDS = 2
PROMPTS, LENGTH, NEW = 16, 32, 48  # texts a batch, tokens a text, tokens decoded after one text
ADAPTERS = ("none", "LoRA", "CA-LoRA")
DENSE, DENSE_TUNED = "bf16 dense", "bf16 dense, tuned"
EQUAL = "LoRA, equal budget"
RANK, BYPASS = 8, 4
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def folder_of(recipe: str) -> Path:
    """Where the compressed model is."""
    made = Path("models/compressed") / recipe
    return made if (made / "compression.json").exists() else Path(".cache/benchmarks") / recipe


def make(recipe: str) -> None:
    """Compress the base by a recipe of params.yaml, unless that was done."""
    from calora.compression import compress
    from calora.compression.walk import Calibration
    from calora.models.loading import load_model, load_tokenizer
    from calora.saving import save
    from stages.common import BASE, TUNING
    from stages.config import load_params
    from stages.splits import read_calibration

    if not (folder_of(recipe) / "compression.json").exists():
        tokenizer = load_tokenizer(BASE)
        calibration = Calibration(read_calibration(tokenizer), tuning=read_calibration(tokenizer, TUNING))
        model = load_model(BASE, torch.bfloat16)
        save(model, compress(model, load_params().compressions[recipe], calibration), folder_of(recipe), BASE)


def opened(recipe: str, adapter: str) -> Any:
    """The model as a user opens it, with its adapter on."""
    from calora.adapters.lora import lora_config

    config = lora_config(RANK + BYPASS if adapter == EQUAL else RANK, 2 * RANK, TARGETS)
    if recipe in (DENSE, DENSE_TUNED):
        from peft import get_peft_model
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from calora.layers.onetoken import OneToken

        model: Any = AutoModelForCausalLM.from_pretrained("models/base", dtype=torch.bfloat16)
        if recipe == DENSE_TUNED:
            model.__class__ = type("Tuned", (OneToken, type(model)), {})
        if adapter != "none":
            model = get_peft_model(model, config, autocast_adapter_dtype=False).to(torch.bfloat16)
        model.calora_tokenizer = AutoTokenizer.from_pretrained("models/base")  # calora.load reads it too
        return model.eval()
    import calora

    model = calora.load(folder_of(recipe))
    if adapter != "none":
        from calora.adapters.lora import attach_adapter, set_active
        from calora.inheritance.fresh import fresh_adapter
        from calora.inheritance.inherit import random_bypasses
        from calora.models.anatomy import linear_layers

        made = fresh_adapter(model, config, {"activation": "identity"})
        if adapter == "CA-LoRA":
            made.recovery = random_bypasses(linear_layers(model), BYPASS, "identity")
        for part in (made.lora, made.recovery):
            part.update({key: value.bfloat16() for key, value in part.items()})  # as they are stored
        attach_adapter(model, made, "a")
        set_active(model, "a")
    return model


def measure(recipe: str, adapter: str) -> dict[str, float]:
    """Tokens a second of one text's prefill, of a batch's, and of decoding; seconds to load; MB at the peak, and before."""
    import peft  # noqa: F401  # what every row needs is not a row's own memory
    import transformers.models.llama.modeling_llama  # noqa: F401

    import calora.compressed  # noqa: F401

    before = resident()
    start = time.monotonic()
    model = opened(recipe, adapter)
    loading = time.monotonic() - start
    ids = torch.randint(100, 40000, (PROMPTS, LENGTH), generator=torch.Generator().manual_seed(0))
    found = {"load": loading}
    with torch.no_grad():
        for name, batch in (("p1", ids[:1]), ("p16", ids)):
            seconds = best(lambda batch=batch: prefill(model, batch))
            found[name] = batch.numel() / seconds
        options = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids[:1])}
        one = best(lambda: model.generate(input_ids=ids[:1], max_new_tokens=1, min_new_tokens=1, **options))
        more = best(lambda: model.generate(input_ids=ids[:1], max_new_tokens=NEW, min_new_tokens=NEW, **options))
        found["decode"] = (NEW - 1) / (more - one)
    peak = peak_resident()
    return {**found, "peak": peak, "own": peak - before}


def prefill(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the last position. `logits_to_keep=1` would copy a frozen head once per text: 900 MB, and 3 times slower."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    logits: torch.Tensor = inner.lm_head(inner.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[:, -1])
    return logits


def resident() -> float:
    """MB of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def peak_resident() -> float:
    """MB of this process at its peak; getrusage would also tell of the process that started it."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def best(call: Any, times: int = 4) -> float:
    """Seconds of the fastest of a few calls, after one that warms up."""
    call()
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def main() -> None:
    """All rows, in turn, and the table."""
    if sys.argv[1:2] == ["--row"]:
        print(json.dumps(measure(sys.argv[2], sys.argv[3])))
        return
    from stages.config import load_params

    recipes = sys.argv[1:] or list(load_params().compressions)
    for recipe in recipes:
        make(recipe)
    dense = [(DENSE, "none"), (DENSE, "LoRA"), (DENSE, EQUAL), (DENSE_TUNED, "none"), (DENSE_TUNED, "LoRA")]
    rows = [*dense, *((recipe, adapter) for recipe in recipes for adapter in ADAPTERS)]
    found: dict[tuple[str, str], list[dict[str, float]]] = {row: [] for row in rows}
    for _ in range(ROUNDS):
        for row in rows:
            command = [sys.executable, "-m", "benchmarks.inference", "--row", *row]
            output = subprocess.run(
                command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            ).stdout
            found[row].append(json.loads(output.splitlines()[-1]))
            print(row, found[row][-1], file=sys.stderr, flush=True)
    print(table(found))


def table(found: dict[tuple[str, str], list[dict[str, float]]]) -> str:
    """Markdown; ratios are to bf16 dense with PEFT's LoRA (with an adapter) or without one."""
    lines = [
        "| model | adapter | prefill 1 | prefill 16 | decode | peak MB | own MB | load s | MB on disk | ideal |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    whole = sum(file.stat().st_size for file in Path("models/base").glob("*.safetensors"))
    best_of = {
        row: {key: (max if key in ("p1", "p16", "decode") else min)(r[key] for r in runs) for key in runs[0]}
        for row, runs in found.items()
    }
    for (recipe, adapter), b in best_of.items():
        folder = Path("models/base") if recipe in (DENSE, DENSE_TUNED) else folder_of(recipe)
        size = sum(file.stat().st_size for file in folder.glob("model*.safetensors"))
        base = best_of[(DENSE, "none" if adapter == "none" else "LoRA")]
        cells = [f"{b[key]:.0f} ({b[key] / base[key]:.2f}x)" for key in ("p1", "p16", "decode", "peak", "own")]
        ideal = f"{ideal_speed_up(folder) if folder != Path('models/base') else 1.0:.1f}x"
        lines.append(
            f"| {recipe} | {adapter} | {' | '.join(cells)} | {b['load']:.1f} | {size / 1e6:.0f} ({size / whole:.2f}) | {ideal} |"
        )
    return "\n".join(lines)


def ideal_speed_up(folder: Path) -> float:
    """What the paper's table quotes: bytes of the linear layers before, by those that a token reads after."""
    report = json.loads((folder / "compression.json").read_text())
    before = after = 0.0
    for name, entry in report["layers"].items():
        if entry["kind"] not in ("experts", "embedding"):
            before += entry["bytes_before"]
            after += entry["bytes_after"] * share_used(name, report["layers"])
    untouched = {n: size for n, size in report["untouched"].items() if n.endswith("proj.weight")}
    return float((before + sum(untouched.values())) / (after + sum(untouched.values())))


def share_used(layer: str, layers: dict[str, Any]) -> float:
    """Share of a layer that one token uses: less than 1 in a feed-forward of experts."""
    owner = layers.get(layer.rpartition(".")[0], {})
    if owner.get("kind") != "experts":
        return 1.0
    return float((owner["active"] + owner["shared"]) / (owner["experts"] + owner["shared"]))


if __name__ == "__main__":
    main()
