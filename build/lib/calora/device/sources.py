"""Where the answers of `calora chat` come from: an exported folder in this process, or a server that runs already."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import httpx

from calora.device.catalogue import Catalogue
from calora.device.choose import choose, scored_task
from calora.device.engine import Engine, LlamaEngine, Refused, events, reached, read_answer
from calora.device.limits import KEY, Limits
from calora.errors import CaloraError
from calora.evaluation.choice import Choice, as_row
from calora.models.tasks import Task

Message = Mapping[str, str]  # role and content, as OpenAI has them


class Source(Protocol):
    """Models by name, each with a task or none, and what they answer. All of it raises `Refused` where the runtime does."""

    async def models(self) -> dict[str, Task | None]:
        """Those that are there now, the base first."""
        ...

    def write(self, name: str, messages: Sequence[Message], options: Mapping[str, Any]) -> AsyncGenerator[str, None]:
        """The next message of a chat, piece by piece; leaving early ends the work. `options` are OpenAI's."""
        ...

    async def choose(self, name: str, given: str | dict[str, Any]) -> Choice:
        """The answer to a text, or to a row; raises `CaloraError` where the model's task has no such rows."""
        ...

    async def close(self) -> None:
        """Give all back."""
        ...


class FolderSource:
    """An exported folder, in this process.

    Args:
        catalogue: what it has.
        engine: that runs it.
        context: most tokens of a conversation.
    """

    def __init__(self, catalogue: Catalogue, engine: Engine, context: int) -> None:
        self.catalogue, self.engine, self.context = catalogue, engine, context

    async def models(self) -> dict[str, Task | None]:
        """See `Source`."""
        return {name: model.task for name, model in self.catalogue.models.items()}

    async def write(
        self, name: str, messages: Sequence[Message], options: Mapping[str, Any]
    ) -> AsyncGenerator[str, None]:
        """See `Source`."""
        asked = {"messages": list(messages), "cache_prompt": True, **options}
        async with self.engine.stream("/v1/chat/completions", asked, self.catalogue[name].apply) as pieces:
            async for piece in pieces:
                if text := _content(piece):
                    yield text

    async def choose(self, name: str, given: str | dict[str, Any]) -> Choice:
        """See `Source`."""
        model = self.catalogue[name]
        return await choose(self.engine, model, as_row(scored_task(model), given), self.context)

    async def close(self) -> None:
        """See `Source`."""
        await self.engine.close()


def open_folder(folder: Path, threads: int | None = None) -> FolderSource:
    """Raises `CaloraError` where the folder is none or broken, or xllamacpp is missing."""
    catalogue = Catalogue.read(folder)
    context = min(Limits().context, catalogue.context)
    return FolderSource(catalogue, LlamaEngine(catalogue.base, catalogue.loras, context, 1, threads), context)


class UrlSource:
    """A running `calora serve`; its key is in the environment.

    Args:
        url: of its API, with /v1.
        transport: of httpx; by default the network.
    """

    def __init__(self, url: str, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self.url = url
        headers = {"Authorization": f"Bearer {os.environ.get(KEY, '')}"}
        self.client = httpx.AsyncClient(base_url=url, headers=headers, timeout=None, transport=transport)

    async def models(self) -> dict[str, Task | None]:
        """See `Source`; raises `CaloraError` where no server answers, or the key is another one."""
        fix = "start one: calora serve FOLDER, or correct --url (it ends with /v1)"
        try:
            with reached():
                found = read_answer(await self.client.get("/models"))
            return {one["id"]: Task.from_json(one["task"]) if "task" in one else None for one in found["data"]}
        except (httpx.InvalidURL, Refused, KeyError) as error:
            if isinstance(error, Refused) and error.status == 401:
                raise CaloraError(
                    KEY, "the key that the server said", "another one, or none", f"export {KEY}"
                ) from None
            raise CaloraError(f"--url {self.url}", "a running `calora serve`", error, fix) from None

    async def write(
        self, name: str, messages: Sequence[Message], options: Mapping[str, Any]
    ) -> AsyncGenerator[str, None]:
        """See `Source`."""
        asked = {"model": name, "messages": list(messages), "stream": True, **options}
        with reached():
            async with self.client.stream("POST", "/chat/completions", json=asked) as answer:
                if answer.status_code != 200:
                    await answer.aread()
                    read_answer(answer)
                async for piece in events(answer):
                    if text := _content(piece):
                        yield text

    async def choose(self, name: str, given: str | dict[str, Any]) -> Choice:
        """See `Source`."""
        with reached():
            found = read_answer(await self.client.post("/classify", json={"model": name, "input": given}))
        (one,) = found["data"]
        return Choice(one["label"], one["probs"], one["labels"], found["usage"]["prompt_tokens"])

    async def close(self) -> None:
        """See `Source`."""
        await self.client.aclose()


def _content(piece: Mapping[str, Any]) -> str:
    """The text of a piece of a chat; the last one may have none."""
    return "".join(choice["delta"].get("content") or "" for choice in piece.get("choices", []))
