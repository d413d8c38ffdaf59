"""How long a running `calora serve` takes to the first token, alone and with adapters mixed, for one client and for several.

    CALORA_API_KEY=... calora serve device --port 8080
    CALORA_API_KEY=... python -m benchmarks.serve http://127.0.0.1:8080/v1 --models movies tweets --clients 1 4

Prompts are of about 30 tokens and never the same twice, so that no cache helps. Models are drawn at random (mixed), or
the first one is always asked (alone); a switch is what the median to the first token is later when one client's
requests alternate between two models than when they do not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import time
from collections.abc import Callable

import httpx

WORDS = ("a", "film", "that", "was", "long", "and", "dull", "but", "its", "end", "is", "good", "music", "liked", "very")


async def ask(client: httpx.AsyncClient, model: str, tokens: int, rng: random.Random) -> tuple[float, float]:
    """(seconds to the first token, tokens a second after it) of one request."""
    prompt = f"Review: {' '.join(rng.choices(WORDS, k=24))}\nSentiment:"
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "stream": True, "logit_bias": {"0": -100}}
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


async def load(
    client: httpx.AsyncClient, clients: int, requests: int, tokens: int, model: Callable[[int], str]
) -> dict[str, float]:
    """Requests of several clients, each of which sends its next one when it has the last answer."""
    rng, left, found = random.Random(0), iter(range(requests)), list[tuple[float, float]]()

    async def one() -> None:
        for number in left:
            found.append(await ask(client, model(number), tokens, rng))

    start = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(clients)))
    seconds = time.perf_counter() - start
    firsts = sorted(first for first, _ in found)
    return {
        "p50_ms": 1000 * statistics.median(firsts),
        "p95_ms": 1000 * firsts[int(0.95 * (len(firsts) - 1))],
        "max_ms": 1000 * firsts[-1],
        "tokens_per_second": statistics.median(speed for _, speed in found),
        "requests_per_second": requests / seconds,
    }


async def run(chosen: argparse.Namespace) -> None:
    """Print a line a load."""
    headers = {"Authorization": f"Bearer {os.environ['CALORA_API_KEY']}"}
    models, rng = chosen.models, random.Random(1)
    async with httpx.AsyncClient(base_url=chosen.url, headers=headers, timeout=300) as client:

        async def told(name: str, clients: int, model: Callable[[int], str]) -> dict[str, float]:
            found = await load(client, clients, chosen.requests, chosen.tokens, model)
            print(f"{name}, {clients} at a time: {', '.join(f'{key} {value:.1f}' for key, value in found.items())}")
            return found

        await load(client, 1, 4, chosen.tokens, lambda _: models[0])
        for clients in chosen.clients:
            await told("alone", clients, lambda _: models[0])
            await told("mixed", clients, lambda _: rng.choice(models))
        same = await told("alone again", 1, lambda _: models[0])
        turns = await told("alternating", 1, lambda number: models[number % 2])
        print(f"a switch: {turns['p50_ms'] - same['p50_ms']:.1f} ms")


def main() -> None:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="of a running server, with /v1")
    parser.add_argument("--models", nargs="+", required=True, help="two or more")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4], help="requests at a time")
    parser.add_argument("--requests", type=int, default=60, help="of each load")
    parser.add_argument("--tokens", type=int, default=16, help="that each answer has at most")
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
