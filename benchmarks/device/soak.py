"""Many requests at random while adapters come and go; each answer beside that of a fresh runtime with its adapter alone."""

from __future__ import annotations

import asyncio
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks.device.client import WORDS
from benchmarks.device.processes import Served
from benchmarks.device.setting import Setting
from calora.device.catalogue import BASE_NAME, Catalogue, Model
from calora.device.engine import LlamaEngine
from stages.tables import Table

CLIENTS, LONGEST, TOPS = 4, 8, 3  # requests at a time; tokens of an answer: 1 to so many; alternatives of each
COMPANIES = 2  # how often a fresh runtime is asked the same in the company of others
# Of log-probabilities: llama.cpp rounds what a layer reads to 8 bits, so that the same request in another batch, whose sums are
# made in another order, may be off by so much; what is further off is wrong, and so is what is nearer to another adapter's.
CLOSE, FAR = 0.1, 0.5
ABSENT, CHANGE, SAMPLES = (
    50,
    100,
    200,
)  # requests between two for an absent adapter, between two changes; looks at memory
NOTHING: dict[str, list[Any]] = {
    "content": [],
    "tokens": [],
    "top_logprobs": [],
}  # of half a character llama.cpp tells none
Answer = list[
    tuple[str, dict[str, float]]
]  # each token, and the likeliest ones in its place with their log-probabilities
Key = tuple[str, int]  # model, number of the prompt
Expected = dict[Key, list[Answer]]  # alone, then in company


def prompts(count: int, seed: int = 0) -> list[tuple[str, int]]:
    """Short texts, and how many tokens are asked for after each."""
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(WORDS, k=rng.randrange(4, 12))) for _ in range(count)]
    return [(f"Review: {text}\nSentiment:", 1 + number % LONGEST) for number, text in enumerate(texts)]


async def fresh(folder: Path, asked: Sequence[tuple[str, int]], threads: int) -> Expected:
    """The answers of each model, by a runtime of its own that has no other adapter and keeps nothing from text to text.

    Each is asked alone, then some times among others: sums are made in another order there.
    """
    catalogue, found = Catalogue.read(folder), Expected()
    for name, model in catalogue.models.items():
        own = {file: path for file, path in catalogue.loras.items() if file in model.apply}
        engine = LlamaEngine(catalogue.base, own, min(256, catalogue.context), CLIENTS, threads)

        answers = [[await _answer(engine, model, *one)] for one in asked]
        for seed in range(COMPANIES):
            order = random.Random(seed).sample(range(len(asked)), len(asked))
            for start in range(0, len(order), CLIENTS):
                some = order[start : start + CLIENTS]
                together = await asyncio.gather(*(_answer(engine, model, *asked[number]) for number in some))
                for number, answer in zip(some, together, strict=True):
                    answers[number].append(answer)
        found |= {(name, number): own for number, own in enumerate(answers)}
        await engine.close()
    return found


async def _answer(engine: LlamaEngine, model: Model, text: str, tokens: int) -> Answer:
    body = {"prompt": text, "max_tokens": tokens, "temperature": 0.0, "n_probs": TOPS, "cache_prompt": False}
    said = await engine.ask("/v1/completions", body, model.apply)
    steps = (said["choices"][0]["logprobs"] or NOTHING)["content"]
    return [(one["token"], {other["token"]: other["logprob"] for other in one["top_logprobs"]}) for one in steps]


def nearest(expected: Sequence[Answer], found: Answer) -> float:
    """How far an answer is from the nearest of some."""
    return min(distance(one, found) for one in expected)


def distance(expected: Answer, found: Answer) -> float:
    """How far log-probabilities are from each other (root mean square), of what both tell up to the first token that differs."""
    squares, parted = [], False
    for (token, tops), (other, others) in zip(expected, found, strict=False):
        squares += [(tops[one] - others[one]) ** 2 for one in tops.keys() & others.keys()]
        if parted := token != other:
            if token not in others or other not in tops:  # else each is nearly as probable as the other one
                return math.inf
            break
    if len(expected) != len(found) and not parted:
        return math.inf
    return math.sqrt(sum(squares) / max(1, len(squares)))


def told_apart(expected: Expected) -> float:
    """Share of (prompt, adapter, other adapter) whose answers are further from each other than one may be from itself."""
    names, numbers = {name for name, _ in expected}, {number for _, number in expected}
    pairs = [(a, b, n) for n in numbers for a in names for b in names if a != b]
    return sum(nearest(expected[a, n], expected[b, n][0]) > CLOSE for a, b, n in pairs) / len(pairs)


class Soak:
    """The requests, and what became of them.

    Args:
        client: of the server.
        expected: what each model says to each prompt; `asked` are these.
        memory: MB of the server now.
    """

    def __init__(
        self,
        client: httpx.AsyncClient,
        asked: Sequence[tuple[str, int]],
        expected: Expected,
        memory: Callable[[], float],
    ) -> None:
        self.client, self.asked, self.expected, self.memory = client, asked, expected, memory
        self.names = list(dict.fromkeys(name for name, _ in expected))
        self.there = list(self.names)
        self.away: list[str] = []
        self.removed = 0  # how often an adapter was taken out
        self.counts, self.problems = Counter[str](), list[str]()
        self.samples = list[tuple[int, float]]()
        self.off = [0.0]  # by how much log-probabilities of right answers differ
        self.changing = asyncio.Lock()

    async def run(self, requests: int, seed: int = 0) -> dict[str, Any]:
        """Send them."""
        rng, left, start = random.Random(seed), iter(range(requests)), time.monotonic()

        async def one() -> None:
            for number in left:
                if number % max(1, requests // SAMPLES) == 0 and not self.changing.locked():
                    self.samples.append((number, self.memory()))
                if number % CHANGE == CHANGE - 1 and not self.changing.locked():
                    await self.change(rng)
                await self.request(rng, absent=self.settled and number % ABSENT == 0)
                if number % 500 == 0:
                    print(number, dict(self.counts), self.samples[-1:], file=sys.stderr, flush=True)

        await asyncio.gather(*(one() for _ in range(CLIENTS)))
        self.samples.append((requests, self.memory()))
        sizes = [size for _, size in self.samples]
        return {
            "requests": requests, "counts": dict(self.counts), "problems": self.problems[:10],
            "off": {"p99": float(np.quantile(self.off, 0.99)), "most": max(self.off)}, "told_apart": told_apart(self.expected),
            "memory_mb": {"first": sizes[0], "median": float(np.median(sizes)), "last": sizes[-1], "most": max(sizes)},
            "slope": slope(self.samples), "seconds": time.monotonic() - start,
        }  # fmt: skip

    @property
    def settled(self) -> bool:
        """Whether an adapter is out for certain."""
        return bool(self.away) and not self.changing.locked()

    async def request(self, rng: random.Random, absent: bool) -> None:
        """One, of an adapter that is there, or of one that is not: that is refused."""
        model, number = rng.choice(self.away if absent else self.there), rng.randrange(len(self.asked))
        text, tokens = self.asked[number]
        body = {"model": model, "prompt": text, "max_tokens": tokens, "temperature": 0.0, "logprobs": TOPS}
        removed = self.removed
        try:
            answer = await self.client.post("/completions", json=body)
        except httpx.HTTPError as error:
            return self.note("error", f"{model}: {error!r}")
        if answer.status_code == 404 and (absent or self.removed > removed or model in self.away):
            return self.note("refused, as it should be")
        if answer.status_code != 200 or (absent and model in self.away):
            return self.note("error", f"{model}: {answer.status_code} {answer.text[:200]}")
        found = answer.json()["choices"][0]["logprobs"] or NOTHING
        expected, said = self.expected[model, number], list(zip(found["tokens"], found["top_logprobs"], strict=True))
        off = nearest(expected, said)
        others = (nearest(self.expected[other, number], said) for other in self.names if other != model)
        if off > CLOSE and (off > FAR or min(others) < off):
            return self.note("wrong", f"{model}, prompt {number}, off by {off:.3f}: {said} for {expected[0]}")
        self.off.append(off)
        self.note("same" if [token for token, _ in said] == [token for token, _ in expected[0]] else "tie")

    def note(self, what: str, problem: str = "") -> None:
        """What became of a request."""
        self.counts[what] += 1
        if problem:
            self.problems.append(problem)

    async def change(self, rng: random.Random) -> None:
        """Take an adapter out, or bring one back; a server without such routes keeps all."""
        async with self.changing:
            if len(self.away) < 2:
                name = rng.choice([name for name in self.there if name != BASE_NAME])
                self.there.remove(name)
                self.away.append(name)
                self.removed += 1
                answer = await self.client.post("/unload_lora_adapter", json={"lora_name": name})
                if answer.status_code != 200:
                    self.away.remove(name)
            else:
                name = rng.choice(self.away)
                answer = await self.client.post("/load_lora_adapter", json={"lora_name": name})
                if answer.status_code == 200:
                    self.away.remove(name)
            if name not in self.away:
                self.there.append(name)
            if answer.status_code == 200:
                self.note("changes")
            elif answer.status_code not in (404, 405):  # not a server without such routes
                self.note("error", f"change of {name}: {answer.status_code} {answer.text[:200]}")


def slope(samples: Sequence[tuple[int, float]]) -> float:
    """MB a thousand requests, by least squares, of the second half."""
    half = np.array(samples[len(samples) // 2 :], dtype=float)
    return float(1000 * np.polyfit(half[:, 0], half[:, 1], 1)[0]) if len(half) > 1 else 0.0


def measure(setting: Setting) -> dict[str, Any]:
    """Of the compressed base with `setting.mixed` adapters."""
    folder, asked, threads = setting.exported(setting.mixed), prompts(setting.prompts), setting.threads[0]

    async def run() -> dict[str, Any]:
        expected = await fresh(folder, asked, threads)
        with Served(folder, threads) as server:
            async with server.client() as client:
                return await Soak(client, asked, expected, lambda: server.memory).run(setting.soak)

    return {"adapters": setting.mixed, **asyncio.run(run())}


def table(found: dict[str, Any]) -> Table:
    """What became of the requests."""
    counts, memory, off = found["counts"], found["memory_mb"], found["off"]
    made = Table("soak", ["", ""], {0})
    for name, value in (
        ("requests", f"{found['requests']:,}, of {found['adapters']} adapters and the base, four at a time"),
        ("changes: an adapter taken out, or brought back", f"{counts.get('changes', 0):,}"),
        ("answers as those of a fresh runtime", f"{counts.get('same', 0):,}"),
        ("the same up to two tokens that are as probable", f"{counts.get('tie', 0):,}"),
        ("answers that are nearer to those of another adapter, or far from all", f"{counts.get('wrong', 0):,}"),
        ("refused because their adapter was out", f"{counts.get('refused, as it should be', 0):,}"),
        ("errors", f"{counts.get('error', 0):,}"),
        (f"pairs of adapters whose answers to a prompt are {CLOSE} or more apart", f"{100 * found['told_apart']:.1f} %"),
        ("log-probabilities of an answer are off by (root mean square): 99 % of answers, all", f"{off['p99']:.3f}, {off['most']:.3f}"),
        ("MB in memory at the first look, the median, the last, the most", ", ".join(f"{memory[one]:.0f}" for one in ("first", "median", "last", "most"))),
        ("its slope in the second half, MB a thousand requests", f"{found['slope']:+.2f}"),
        ("minutes", f"{found['seconds'] / 60:.0f}"),
    ):  # fmt: skip
        made.rows.append([name, value])
    return made
