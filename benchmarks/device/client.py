"""Requests to `calora serve`, one client's or several', and how long they take."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections.abc import Callable

import httpx

WORDS = ("a", "film", "that", "was", "long", "and", "dull", "but", "its", "end", "is", "good", "music", "liked", "very")


Target = tuple[httpx.AsyncClient, str]  # a server, and a model of it


def prompt_of(rng: random.Random) -> str:
    """About 30 tokens, which never begin as another one's, so that no cache helps."""
    return f"{rng.randrange(10**6)}. {' '.join(rng.choices(WORDS, k=20))}\nSentiment:"


async def ask(target: Target, tokens: int, rng: random.Random) -> tuple[float, float]:
    """(seconds to the first token, tokens a second after it) of one request."""
    client, model = target
    body = {"model": model, "prompt": prompt_of(rng), "max_tokens": tokens, "stream": True, "logit_bias": {"0": -100}}
    start, times = time.perf_counter(), list[float]()
    async with client.stream("POST", "/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise RuntimeError(event["error"]["message"])
                times.append(time.perf_counter())
    return times[0] - start, (len(times) - 2) / (times[-1] - times[0]) if len(times) > 2 else 0.0


async def load(clients: int, requests: int, tokens: int, target: Callable[[int], Target]) -> dict[str, float]:
    """Requests of several clients, each of which sends its next one when it has the last answer.

    Args:
        target: of the request of a number.
    """
    rng, left, found = random.Random(0), iter(range(requests)), list[tuple[float, float]]()

    async def one() -> None:
        for number in left:
            found.append(await ask(target(number), tokens, rng))

    start = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(clients)))
    rates = {"tokens_per_second": statistics.median(speed for _, speed in found)}
    return summary([first for first, _ in found], time.perf_counter() - start) | rates


def summary(firsts: list[float], seconds: float) -> dict[str, float]:
    """Of the seconds to each first token, and of all requests."""
    ordered = sorted(firsts)
    return {
        "p50_ms": 1000 * statistics.median(ordered),
        "p95_ms": 1000 * ordered[int(0.95 * (len(ordered) - 1))],
        "max_ms": 1000 * ordered[-1],
        "requests_per_second": len(ordered) / seconds,
    }
