"""llama.cpp on an exported folder, in this process: a model that answers rows and writes, as that of `calora.load` does.

Nothing here imports torch.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from calora.common.progress import progress
from calora.device.catalogue import BASE_NAME, Catalogue, Model, NoSuchModel
from calora.device.choose import choose, prompt_ids, write
from calora.device.engine import Engine, LlamaEngine, Refused
from calora.device.limits import Limits
from calora.errors import CaloraError
from calora.evaluation.choice import Choice, rows_of
from calora.models.tasks import Row, Task

T = TypeVar("T")
Text = str | Mapping[str, Any]  # for the first column of a prompt, or a row


class Llama:
    """An exported base in llama.cpp, which runs in this process, with its adapters, of which one is active, or none.

    Args:
        folder: what `calora export` wrote.
        convert: writes the GGUF LoRA of an adapter's folder for this base (folder, file) and returns its task; without it the
            adapters are those of the folder.
        context: most tokens of a prompt and its answer.
        slots: texts that are worked on at a time; with one, answers do not depend on what else is asked, to the last bit.
        threads: of the processor; by default as many as llama.cpp takes.

    Raises:
        CaloraError: it is no such folder, or a file is missing, truncated or another one.
    """

    def __init__(
        self,
        folder: str | Path,
        convert: Callable[[Path, Path], Task] | None = None,
        *,
        context: int = Limits.context,
        slots: int = Limits.slots,
        threads: int | None = None,
    ) -> None:
        self.catalogue, self.convert = Catalogue.read(Path(folder)), convert
        self.context, self.slots, self.threads = min(context, self.catalogue.context), slots, threads
        self.active = BASE_NAME
        self._engine: Engine | None = None
        self._scratch = TemporaryDirectory(prefix="calora-")  # of converted adapters

    def load_adapter(self, path: str | Path, name: str) -> None:
        """Load a CA-LoRA adapter folder under `name`; one that is loaded where there is none becomes active.

        llama.cpp reads LoRAs at its start: the next question starts it again.

        Raises:
            CaloraError: the name is taken, the folder is not an adapter or is another base's, it has no linear form, or the base
                is an exported folder.
        """
        if name in self.catalogue.models:
            raise CaloraError(
                "load_adapter", "a name that is free", f"{name!r}, which is taken", "unload_adapter it first"
            )
        if self.convert is None:
            fix = "export it with this adapter too, or load the folder of the compressed model"
            raise CaloraError(
                "load_adapter", "the folder of a compressed model", f"the export {self.catalogue.folder}", fix
            )
        file = str(Path(self._scratch.name) / f"{len(list(Path(self._scratch.name).iterdir()))}.gguf")
        model = Model(name, (*self.catalogue[BASE_NAME].apply, file), self.convert(Path(path), Path(file)))
        self._with({**self.catalogue.models, name: model})
        if len(self.catalogue.models) == 2:  # the base is one
            self.set_adapter(name)

    def unload_adapter(self, name: str) -> None:
        """Take the adapter `name` off; if it was active, none is then."""
        if name == BASE_NAME or name not in self.catalogue.models:
            raise CaloraError("unload_adapter", f"one of {self.adapters}", name, "name one that is loaded")
        self._with({known: model for known, model in self.catalogue.models.items() if known != name})
        if self.active == name:
            self.set_adapter(None)

    @property
    def adapters(self) -> list[str]:
        """Names of those that are loaded."""
        return [name for name in self.catalogue.models if name != BASE_NAME]

    def set_adapter(self, name: str | None) -> None:
        """Switch to the adapter `name`; None uses the compressed model alone.

        Raises:
            CaloraError: there is none of that name.
        """
        try:
            self.active = self.catalogue[name or BASE_NAME].name
        except NoSuchModel:
            raise CaloraError("set_adapter", f"one of {self.adapters}", name, "load it with load_adapter") from None

    def answer(self, texts: Sequence[Text], title: str | None = None) -> list[str]:
        """Answer texts with the active adapter's task: a text, or a mapping with the prompt's columns.

        Args:
            title: what the progress bar says; without one there is none.

        Raises:
            CaloraError: no adapter is active, or a row lacks a column.
        """
        model, task = self._asked()
        if task.scored:
            return [choice.answer for choice in self.choose(texts, title)]
        longest = min(task.max_tokens, self.context - task.max_new_tokens)

        async def one(engine: Engine, row: Row) -> str:
            prompt = await prompt_ids(engine, task.render(row), longest)
            return (await write(engine, model, prompt, task.max_new_tokens)).strip()

        return self._each(one, rows_of(task, texts), title)

    def choose(self, texts: Sequence[Text], title: str | None = None) -> list[Choice]:
        """The most probable of each text's answers, and how probable each is; arguments and errors as of `answer`."""
        model, task = self._asked()

        async def one(engine: Engine, row: Row) -> Choice:
            return await choose(engine, model, row, self.context)

        return self._each(one, rows_of(task, texts), title)

    def complete(self, prompts: Sequence[str], max_new_tokens: int, title: str | None = None) -> list[str]:
        """What the model writes behind each prompt, greedily, up to an end token.

        Raises:
            CaloraError: a prompt and what is to be written are longer than the context.
        """
        model = self.catalogue[self.active]

        async def one(engine: Engine, prompt: str) -> str:
            return await write(engine, model, await engine.tokenize(prompt), max_new_tokens)

        return self._each(one, prompts, title)

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each text, with what the tokenizer puts around it."""

        async def one(engine: Engine, text: str) -> list[int]:
            return await engine.tokenize(text)

        return self._each(one, texts, None)

    def close(self) -> None:
        """Give the memory back; the next question takes it again."""
        if self._engine is not None:
            _run(self._engine.close())
        self._engine = None

    def _with(self, models: dict[str, Model]) -> None:
        self.close()
        self.catalogue = replace(self.catalogue, models=models)

    def _asked(self) -> tuple[Model, Task]:
        model = self.catalogue[self.active]
        if model.task is None:
            raise CaloraError("answer", "an active adapter", "none", "call load_adapter and set_adapter first")
        return model, model.task

    def _each(self, work: Callable[[Engine, Any], Awaitable[T]], items: Sequence[Any], title: str | None) -> list[T]:
        """The work on each item, on `slots` of them at a time."""
        if self._engine is None:
            self._engine = LlamaEngine(
                self.catalogue.base, self.catalogue.loras, self.context, self.slots, self.threads
            )
        engine = self._engine

        async def all_of_them() -> list[T]:
            some = asyncio.Semaphore(self.slots)
            with progress((), title, "texts", len(items)) as bar:

                async def one(item: Any) -> T:
                    async with some:
                        found = await work(engine, item)
                    bar.update()
                    return found

                return await asyncio.gather(*map(one, items))

        try:
            return _run(all_of_them())
        except Refused as error:
            fix = "shorten the text, or export the folder again"
            raise CaloraError("llama.cpp", "an answer", error, fix) from None


def _run(work: Coroutine[Any, Any, T]) -> T:
    """The result of some work; in a notebook, whose thread has an event loop already, by a thread of its own."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()
