"""What `calora serve` asks of a runtime, and llama.cpp as one: prompts in, tokens out, LoRAs named with every request."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import httpx

from calora.device.worker import Worker
from calora.errors import first_line


class Refused(Exception):
    """The runtime refuses a request; `status` is HTTP's."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Engine(Protocol):
    """A base with LoRAs. Which of them are on is an argument of every request: there is no way to leave it out."""

    @property
    def alive(self) -> bool:
        """Whether it has not ended by itself."""
        ...

    async def load(self, loras: Mapping[str, Path]) -> None:
        """Have these LoRAs, by name, and no others; raises `CaloraError`, and has ended then. Nothing may run meanwhile."""
        ...

    async def ask(self, path: str, body: Mapping[str, Any], on: Sequence[str]) -> dict[str, Any]:
        """The answer of llama.cpp's own API at a path, with these LoRAs on and all others off; raises `Refused`."""
        ...

    def stream(
        self, path: str, body: Mapping[str, Any], on: Sequence[str]
    ) -> AbstractAsyncContextManager[AsyncIterator[dict[str, Any]]]:
        """The same, piece by piece; raises `Refused` on entering. Leaving early ends the work."""
        ...

    async def tokenize(self, text: str, special: bool = True) -> list[int]:
        """Token ids, with what the tokenizer puts around a text unless not `special`."""
        ...

    async def healthy(self) -> bool:
        """Whether it answers."""
        ...

    async def close(self) -> None:
        """Give all back."""
        ...


class LlamaEngine:
    """llama.cpp's server in a process of its own, on a port of localhost that has a key of its own.

    Args:
        base: base.gguf.
        loras: GGUF LoRAs by name.
        context: most tokens of one request, prompt and answer.
        slots: requests that run at a time.
        threads: of the processor; by default as many as llama.cpp takes.

    Raises:
        CaloraError: xllamacpp is not installed, or llama.cpp cannot load a file.
    """

    def __init__(
        self, base: Path, loras: Mapping[str, Path], context: int, slots: int, threads: int | None = None
    ) -> None:
        self.start = partial(Worker, base, context=context, slots=slots, threads=threads)
        self.names, self.worker = list(loras), self.start(loras)
        # No time limit here: those of the requests are the proxy's, which closes the connection. A connection of its own for
        # each request: one that is kept may be closed by llama.cpp (after 100 requests, or 5 s) just as it is used again.
        self.client = httpx.AsyncClient(timeout=None, trust_env=False, limits=httpx.Limits(max_keepalive_connections=0))
        self._reach(*self.worker.ready())

    def _reach(self, address: str, key: str) -> None:
        self.client.base_url, self.client.headers["Authorization"] = httpx.URL(address), f"Bearer {key}"

    @property
    def alive(self) -> bool:
        """See `Engine`."""
        return self.worker.alive

    async def load(self, loras: Mapping[str, Path]) -> None:
        """See `Engine`: the process ends, and another one starts."""
        await asyncio.to_thread(self.worker.close)
        self.names, self.worker = list(loras), self.start(loras)
        self._reach(*await asyncio.to_thread(self.worker.ready))

    def _with(self, body: Mapping[str, Any], on: Sequence[str]) -> dict[str, Any]:
        # All of them, always: without a list a slot goes on with what another adapter left in its cache, and llama.cpp
        # ignores what it does not know.
        assert set(on) <= set(self.names)
        return {**body, "lora": [{"id": index, "scale": float(name in on)} for index, name in enumerate(self.names)]}

    async def ask(self, path: str, body: Mapping[str, Any], on: Sequence[str]) -> dict[str, Any]:
        """See `Engine`."""
        return await self._post(path, self._with(body, on))

    async def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        with reached():
            return read_answer(await self.client.post(path, json=body))

    @asynccontextmanager
    async def stream(
        self, path: str, body: Mapping[str, Any], on: Sequence[str]
    ) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
        """See `Engine`."""
        asked = {**self._with(body, on), "stream": True}
        with reached():
            async with self.client.stream("POST", path, json=asked) as answer:
                if answer.status_code != 200:
                    await answer.aread()
                    read_answer(answer)
                yield events(answer)

    async def tokenize(self, text: str, special: bool = True) -> list[int]:
        """See `Engine`."""
        asked = {"content": text, "add_special": special, "parse_special": True}
        found: list[int] = (await self._post("/tokenize", asked))["tokens"]
        return found

    async def healthy(self) -> bool:
        """See `Engine`."""
        try:
            return (await self.client.get("/health", timeout=5)).status_code == 200
        except httpx.HTTPError:
            return False

    async def close(self) -> None:
        """See `Engine`."""
        await self.client.aclose()
        await asyncio.to_thread(self.worker.close)


@contextmanager
def reached() -> Iterator[None]:
    """Around requests: a server that does not answer has refused."""
    try:
        yield
    except httpx.HTTPError as error:
        raise Refused(503, f"it does not answer: {first_line(error)}") from None


def read_answer(answer: httpx.Response) -> dict[str, Any]:
    """The object of an answer; raises `Refused` where it is an error."""
    try:
        found: dict[str, Any] = answer.json()
    except ValueError:
        raise Refused(500, f"llama.cpp said {answer.text[:200]!r}") from None
    if answer.status_code != 200:
        raise Refused(answer.status_code, str(found.get("error", {}).get("message", found))[:500])
    return found


async def events(answer: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The objects of a stream of server-sent events, until [DONE]; raises `Refused` where one is an error."""
    async for line in answer.aiter_lines():
        kind, _, value = line.partition(": ")
        if kind == "error":
            value = f'{{"error": {value}}}'
        elif kind != "data" or value.strip() == "[DONE]":
            continue
        found = json.loads(value)
        if "error" in found:
            error = found["error"]
            raise Refused(int(error.get("code", 500)), str(error.get("message", error))[:500])
        yield found
