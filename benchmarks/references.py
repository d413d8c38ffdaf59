"""Our compression beside other packages': perplexity on the same held-back texts, calibrated on the same texts.

`python -m benchmarks.references ours`, `torchao`, `bitsandbytes`, `llmcompressor` or `gptqmodel`, after `make run` and
`python -m stages.download nyt` (perplexity is measured on unlabelled texts of both tasks). The packages want other versions
of what calora needs: install the one that is asked for, with torch and transformers, into an environment of its own, and run
this with its python (only `ours` imports calora). Every row measures the weights alone: a plain bf16 transformers model gets
the values that the package stores, so that no package's kernels count. CALORA_DTYPE=float32 computes in fp32, for a CPU without
bf16 kernels.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

BASE, CALIBRATION, TUNING = "models/base", "data/calibration/texts.jsonl", "data/calibration/tuning.jsonl"
HELD_BACK = {"data/movies/unlabelled.jsonl": 128, "data/nyt/unlabelled.jsonl": 64}
DTYPE = {"bfloat16": torch.bfloat16, "float32": torch.float32}[os.environ.get("CALORA_DTYPE") or "bfloat16"]
Weights = dict[str, Tensor]


def read(path: str) -> list[str]:
    """The texts of a file."""
    return [json.loads(line)["text"] for line in Path(path).read_text(encoding="utf-8").splitlines()]


def calibration() -> list[list[int]]:
    """Token ids of the calibration texts."""
    return tokens(CALIBRATION)


def tokens(path: str) -> list[list[int]]:
    """Token ids of the texts of a file."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    return [tokenizer(text).input_ids for text in read(path)]


def held_back() -> list[list[int]]:
    """Token ids of the first texts of the files that are in no text which a compression looked at: those may be prompts."""
    tokenizer, seen = AutoTokenizer.from_pretrained(BASE), "\n".join(read(CALIBRATION) + read(TUNING))
    chosen = [text for path, count in HELD_BACK.items() for text in [t for t in read(path) if t not in seen][:count]]
    return [tokenizer(text).input_ids for text in chosen]


def plain(dtype: torch.dtype = torch.bfloat16) -> Any:
    """The base."""
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=dtype)


def with_weights(weights: Weights) -> Any:
    """The base with these weights in place of its own, as bf16 stores them; it computes in DTYPE."""
    model = plain()
    missing = model.load_state_dict({name: value.to(torch.bfloat16) for name, value in weights.items()}, strict=False)
    assert not missing.unexpected_keys, missing.unexpected_keys[:3]
    return model.to(DTYPE)


def perplexity(model: Any) -> float:
    """exp of the mean loss a token of the held-back texts."""
    total = tokens = 0.0
    with torch.no_grad():
        for text in held_back():
            ids = torch.tensor([text])
            logits = model(input_ids=ids).logits.float()
            total += float(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum"))
            tokens += len(text) - 1
    return math.exp(total / tokens)


def linear_weights(model: Any) -> Weights:
    """The weights of the linear layers in the blocks."""
    return {f"{name}.weight": m.weight.detach() for name, m in model.named_modules() if name.endswith("_proj")}


def ours() -> Iterator[tuple[str, Callable[[], Weights]]]:
    """Recipes of one step."""
    from calora.compression import compress
    from calora.compression.walk import Calibration
    from calora.layers.layout import dense_weight
    from calora.models.anatomy import linear_layers
    from calora.models.loading import load_model
    from calora.models.tasks import Example

    def made(step: dict[str, Any]) -> Weights:
        model = load_model(Path(BASE), torch.bfloat16)
        compress(model, [step], Calibration([Example(ids) for ids in calibration()]), DTYPE)
        layers = linear_layers(model).items()
        return {f"{name}.weight": dense_weight(layer, torch.bfloat16) for name, layer in layers}

    steps: dict[str, dict[str, Any]] = {
        "int8": {"quantize": {"format": "int8"}},
        "int8, GPTQ": {"quantize": {"format": "int8", "rounding": "gptq"}},
        "nf4": {"quantize": {"format": "nf4"}},
        "int4 group 64, nearest": {"quantize": {"format": "int4", "group": 64}},
        "int4 group 64, GPTQ": {"quantize": {"format": "int4", "group": 64, "rounding": "gptq"}},
        "int4 group 64 asymmetric, GPTQ": {
            "quantize": {"format": "int4", "group": 64, "rounding": "gptq", "symmetric": False}
        },
        "2:4 magnitude": {"prune": {"score": "magnitude", "pattern": "2:4"}},
        "2:4 Wanda": {"prune": {"score": "wanda", "pattern": "2:4"}},
        "2:4 SparseGPT": {"prune": {"score": "sparsegpt", "pattern": "2:4"}},
        "half, SparseGPT": {"prune": {"score": "sparsegpt", "pattern": "unstructured", "sparsity": 0.5}},
        "half, SparseGPT, OWL": {
            "prune": {"score": "sparsegpt", "pattern": "unstructured", "sparsity": 0.5, "allocation": "owl"}
        },
    }
    for name, step in steps.items():
        yield name, partial(made, step)


def torchao() -> Iterator[tuple[str, Callable[[], Weights]]]:
    """Weight-only int8, nearest."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    def made() -> Weights:
        model = plain()
        quantize_(model.model, Int8WeightOnlyConfig())
        return {name: weight.dequantize() for name, weight in linear_weights(model).items()}

    yield "int8", made


def bitsandbytes() -> Iterator[tuple[str, Callable[[], Weights]]]:
    """LLM.int8's weights and nf4 with double quantisation."""
    import bitsandbytes.functional as bnb

    def int8() -> Weights:
        made = {}
        for name, weight in linear_weights(plain()).items():
            codes, scale, _ = bnb.int8_vectorwise_quant(weight.half())
            made[name] = bnb.int8_vectorwise_dequant(codes, scale)
        return made

    def nf4() -> Weights:
        made = {}
        for name, weight in linear_weights(plain()).items():
            codes, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
            made[name] = bnb.dequantize_4bit(codes, state)
        return made

    yield "int8", int8
    yield "nf4", nf4


def llmcompressor() -> Iterator[tuple[str, Callable[[], Weights]]]:
    """GPTQ, SparseGPT and Wanda."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier

    def made(modifier: Any) -> Weights:
        model, ours = plain(), calibration()
        rows = Dataset.from_list([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in ours])
        oneshot(
            model=model, dataset=rows, recipe=[modifier], num_calibration_samples=len(ours), max_seq_length=512,
            processor=AutoTokenizer.from_pretrained(BASE),
        )  # fmt: skip
        return linear_weights(model)

    def int4(symmetric: bool) -> Any:
        weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64, "symmetric": symmetric}
        groups = {"all": {"targets": ["Linear"], "weights": weights}}
        return GPTQModifier(targets="Linear", ignore=["lm_head"], config_groups=groups)

    pattern = {"sparsity": 0.5, "mask_structure": "2:4", "targets": ["Linear"], "ignore": ["lm_head"]}
    yield "int4 group 64, GPTQ", lambda: made(int4(True))
    yield "int4 group 64 asymmetric, GPTQ", lambda: made(int4(False))
    yield "2:4 Wanda", lambda: made(WandaPruningModifier(**pattern))
    yield "2:4 SparseGPT", lambda: made(SparseGPTModifier(**pattern))


def gptqmodel() -> Iterator[tuple[str, Callable[[], Weights]]]:
    """GPTQ."""
    cores = max(4, os.cpu_count() or 1)  # its pools ask for more workers than it makes for two cores, and it stops
    os.cpu_count = lambda: cores
    from gptqmodel import GPTQModel, QuantizeConfig
    from safetensors.torch import load_file

    def nibbles(words: Tensor) -> Tensor:
        """int32 [..., n] -> [..., n, 8], the first in the lowest bits."""
        return (words.unsqueeze(-1) >> torch.arange(0, 32, 4)) & 15

    def made(symmetric: bool) -> Weights:
        model = GPTQModel.load(BASE, QuantizeConfig(bits=4, group_size=64, sym=symmetric), device="cpu")
        model.quantize([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in calibration()], batch_size=1)
        with tempfile.TemporaryDirectory() as folder:
            model.save(folder)
            stored = {k: v for file in Path(folder).glob("*.safetensors") for k, v in load_file(file).items()}
            config = json.loads((Path(folder) / "quantize_config.json").read_text())
        shift = 1 if config.get("checkpoint_format", "gptq") == "gptq" else 0  # the first format stores zero - 1
        weights = {}
        for name in {key.removesuffix(".qweight") for key in stored if key.endswith(".qweight")}:
            codes = nibbles(stored[f"{name}.qweight"].T).flatten(-2)  # [out, in]
            zeros = nibbles(stored[f"{name}.qzeros"]).flatten(-2) + shift  # [groups, out]
            group = stored[f"{name}.g_idx"].long()
            scale = stored[f"{name}.scales"].float()
            weights[f"{name}.weight"] = (codes - zeros[group].T) * scale[group].T
        return weights

    yield "int4 group 64, GPTQ", lambda: made(True)
    yield "int4 group 64 asymmetric, GPTQ", lambda: made(False)


def main() -> None:
    """A line for each kind of compression that the package has; more arguments choose among them by a part of the name."""
    package, *wanted = sys.argv[1:]
    kinds = {f.__name__: f for f in (ours, torchao, bitsandbytes, llmcompressor, gptqmodel)}
    for name, make in kinds[package]():
        if wanted and not any(part in name for part in wanted):
            continue
        start = time.monotonic()
        weights = make()
        seconds = time.monotonic() - start
        print(f"{package} | {name} | {perplexity(with_weights(weights)):.1f} | {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
