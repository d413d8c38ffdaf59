"""A runtime in a process of its own, which measures itself as it is told: `benchmarks.device.processes.Worker` starts it."""

from __future__ import annotations

import asyncio
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.device.client import summary

LENGTH, NEW = 32, 48  # tokens of a prompt, and that are decoded after it
TIMES = 3  # of which the fastest counts


def prompt(seed: int, vocabulary: int) -> list[int]:
    """Token ids; the first ones of a vocabulary are special."""
    return random.Random(seed).choices(range(min(100, vocabulary // 2), vocabulary), k=LENGTH)


def decode(write: Callable[[Sequence[int], int], Any], vocabulary: int) -> float:
    """Tokens a second after the first one of an answer."""

    def fastest(tokens: int) -> float:
        times = []
        for seed in range(TIMES):
            ids, start = prompt(seed, vocabulary), time.perf_counter()
            write(ids, tokens)
            times.append(time.perf_counter() - start)
        return min(times)

    return (NEW - 1) / (fastest(NEW) - fastest(1))


class Llama:
    """llama.cpp with an exported folder; the first adapter of it is on."""

    def __init__(self, folder: str, threads: int) -> None:
        from calora.device.catalogue import Catalogue
        from calora.device.engine import LlamaEngine

        catalogue = Catalogue.read(Path(folder))
        self.runner, self.vocabulary = asyncio.Runner(), vocabulary_of(catalogue.base)
        self.on = list(catalogue.models.values())[-1].apply
        context = min(catalogue.context, LENGTH + NEW + 16)
        loras = {name: path for name, path in catalogue.loras.items() if name in self.on}
        self.engine = LlamaEngine(catalogue.base, loras, context, 1, threads)

    def write(self, ids: Sequence[int], tokens: int) -> None:
        """An answer of so many tokens."""
        asked = {
            "prompt": list(ids),
            "n_predict": tokens,
            "temperature": 0.0,
            "cache_prompt": False,
            "ignore_eos": True,
        }
        found = self.runner.run(self.engine.ask("/completion", asked, self.on))
        assert found["tokens_predicted"] == tokens

    def decode(self) -> float:
        """See `decode`."""
        return decode(self.write, self.vocabulary)


def vocabulary_of(base: Path) -> int:
    """Rows of the table of a GGUF file."""
    import gguf

    return int(next(one for one in gguf.GGUFReader(base).tensors if one.name == "token_embd.weight").shape[1])


class Peft:
    """transformers and PEFT in bf16: one base with LoRAs, which may be one and the same file under several names."""

    def __init__(self, base: str, adapters: Sequence[str], count: int, threads: int) -> None:
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self.torch = torch
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        self.names, self.vocabulary = [f"a{number}" for number in range(count)], int(model.config.vocab_size)
        start = time.perf_counter()
        for number, name in enumerate(self.names):
            folder = adapters[number % len(adapters)]
            if number == 0:
                model = PeftModel.from_pretrained(model, folder, name, autocast_adapter_dtype=False)
            else:
                model.load_adapter(folder, name, autocast_adapter_dtype=False)
        self.loading = (time.perf_counter() - start) / count
        self.model = model.to(torch.bfloat16).eval()
        self.model.set_adapter(self.names[0])

    def write(self, ids: Sequence[int], tokens: int, streamer: Any = None) -> None:
        """An answer of so many tokens."""
        asked = self.torch.tensor([ids])
        with self.torch.no_grad():
            self.model.generate(
                input_ids=asked, attention_mask=self.torch.ones_like(asked), max_new_tokens=tokens, min_new_tokens=tokens,
                do_sample=False, pad_token_id=0, streamer=streamer,
            )  # fmt: skip

    def decode(self) -> float:
        """See `decode`."""
        return decode(self.write, self.vocabulary)

    def load(self, requests: int, tokens: int, mixed: bool) -> dict[str, Any]:
        """Requests one after another, with the first adapter or with any; and ms of a switch and of a further adapter."""
        rng, firsts, switches, begun = random.Random(0), list[float](), list[float](), time.perf_counter()
        for number in range(requests):
            times = Times()
            if mixed:
                self.model.set_adapter(rng.choice(self.names))
                switches.append(time.perf_counter() - times.all[0])
            self.write(prompt(number, self.vocabulary), tokens, times)
            firsts.append(times.all[2] - times.all[0])
        ms = {"switch_ms": 1000 * statistics.median(switches)} if mixed else {}
        return summary(firsts, time.perf_counter() - begun) | ms | {"loading_ms": 1000 * self.loading}


class Contexts:
    """See `benchmarks.device.native`."""

    def __init__(self, folder: str, threads: int) -> None:
        from calora.device.catalogue import Catalogue

        catalogue = Catalogue.read(Path(folder))
        some = [[catalogue.folder / file for file in model.apply] for model in list(catalogue.models.values())[1:]]
        self.given = (catalogue.base, some, threads)

    def compare(self) -> dict[str, float]:
        """See there."""
        from benchmarks.device.native import compare

        return compare(*self.given)


class Times:
    """A streamer of transformers that notes when its prompt and each token come, after the time at which it was made."""

    def __init__(self) -> None:
        self.all = [time.perf_counter()]

    def put(self, _: Any) -> None:
        """The prompt, then a token at a time."""
        self.all.append(time.perf_counter())

    def end(self) -> None:
        """Of the answer."""


def main() -> None:
    """Do what each line says, until there is no more."""
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints
    kind, options = sys.argv[1], json.loads(sys.argv[2])
    runtime = {"llama": Llama, "peft": Peft, "contexts": Contexts}[kind](**options)
    print("ready", file=said, flush=True)
    for line in sys.stdin:
        work, given = json.loads(line)
        print(json.dumps(getattr(runtime, work)(**given)), file=said, flush=True)


if __name__ == "__main__":
    main()
