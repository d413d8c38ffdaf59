"""Which adapters are in memory while a folder is served: they come, go, and make room for each other.

llama.cpp reads LoRAs only at its start. So a change ends it and starts it with others (`Engine.load`), in a turn of its
own or in that of the model which needs it (`calora.device.queue`): nothing runs then, and there is never a second base.
What is in memory after a change are the adapters that were asked for last, as many as fit; whoever waits has asked.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from calora.device.catalogue import BASE_NAME, Catalogue, Model, NoSuchModel
from calora.device.engine import Engine, Refused
from calora.device.limits import Limits
from calora.device.queue import AdapterQueue
from calora.errors import CaloraError

CHANGE = ""  # whose turn a change is
Stamp = tuple[int, int, int]  # of a file: bytes, when it was written (ns), inode
NOTHING: Stamp = (0, 0, 0)  # of none


class Pool:
    """The models of a folder, over one engine.

    Args:
        catalogue: the models; adapters are added to it and taken out of it.
        start: the engine with these LoRAs.
        limits: of requests.
        memory: MB that adapters may take, the base's own LoRA not counted; None: as many as there are.
        allowed: folders besides the served one of which files may be added.

    Raises:
        CaloraError: an adapter is larger than `memory`, or the engine does not start.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        start: Callable[[Mapping[str, Path]], Engine],
        limits: Limits,
        memory: float | None = None,
        allowed: Collection[Path] = (),
    ) -> None:
        if memory is not None and not memory > 0:
            raise CaloraError("--memory", "more than 0", memory, "correct it")
        self.catalogue, self.allowed = catalogue, allowed
        self.room = float("inf") if memory is None else memory * 1e6
        self.queue = AdapterQueue(limits.slots, limits.waiting, limits.patience)
        self.clock, self.asked = itertools.count(1), dict[str, int]()  # by model, when it was asked for last
        self.lock, self.changes = asyncio.Lock(), set[asyncio.Task[None]]()
        self.stamps = {file: stamp(path) for file, path in catalogue.loras.items()}  # of the files that were checked
        self.base, self.listed = stamp(catalogue.base), dict(catalogue.models)
        self._fits(catalogue.models.values())
        self.loaded = self._chosen()
        self.engine = start(self._paths(self.loaded))

    def has(self, model: Model) -> bool:
        """Whether a model is in memory."""
        return self.engine.alive and set(model.apply) <= self.loaded.keys()

    async def healthy(self) -> bool:
        """Whether the engine answers, or is about to."""
        return bool(self.changes) or await self.engine.healthy()

    @asynccontextmanager
    async def turn(self, model: Model) -> AsyncIterator[None]:
        """A model's turn, with the model in memory.

        Raises:
            Full, Late: see `AdapterQueue.turn`.
            NoSuchModel: it was taken out meanwhile.
            Refused: it cannot be brought in.
        """
        self.asked[model.name] = next(self.clock)
        async with self.queue.turn(model.name):
            if self.catalogue.models.get(model.name) != model:
                raise NoSuchModel(f"The model {model.name!r} was removed or replaced while the request waited")
            if not self.has(model):
                try:
                    await self._to_its_end(self._bring, model)
                except CaloraError as error:
                    raise Refused(503, str(error)) from None
            yield

    async def add(self, name: str, path: str | None = None) -> Model:
        """Serve a further adapter: one that manifest.json has now, or a file.

        Raises:
            NoSuchModel: manifest.json has none of that name, or there is no such file.
            CaloraError: the name is taken, or the file is broken, elsewhere, another base's or too large; all is as before.
        """
        if path is None:
            models = await asyncio.to_thread(self.catalogue.listed)
            if name not in models:
                raise NoSuchModel(f"manifest.json has no adapter {name!r:.100}; it has {', '.join(models)}")
            model = models[name]
        else:
            model = await asyncio.to_thread(self.catalogue.opened, name, path, self.allowed)
        await self._change(put=[model])
        return model

    async def remove(self, name: str) -> None:
        """Serve an adapter no longer: those of its requests that run end as they would, others get `NoSuchModel`.

        Raises:
            NoSuchModel: there is none.
            CaloraError: it is the base.
        """
        if self.catalogue[name].name == BASE_NAME:
            raise CaloraError("lora_name", "an adapter", "the base", "end the server")
        await self._change(out=[name])

    async def follow(self) -> bool:
        """Take what manifest.json has new or otherwise, and leave out what it has no longer; whether that was anything.

        Raises:
            CaloraError: the folder is broken or has another base, or the engine refuses an adapter; what is served stays.
        """
        written = {file for file in self.stamps if self._changed(file)}
        fresh, before = await asyncio.to_thread(self.catalogue.listed, written), self.listed
        put = [
            model
            for name, model in fresh.items()
            if model not in (before.get(name), self.catalogue.models.get(name)) or written & set(model.apply)
        ]
        out, self.listed = before.keys() - fresh.keys(), fresh
        if put or out:
            await self._change(put, out, replace=True)
        return bool(put or out)

    async def close(self) -> None:
        """Give all back, in the middle of a change too."""
        for task in self.changes:
            task.cancel()
        await asyncio.gather(*self.changes, return_exceptions=True)
        await self.engine.close()

    async def _change(self, put: Collection[Model] = (), out: Iterable[str] = (), replace: bool = False) -> None:
        """Take models out at once, and put others in when nothing runs."""
        stamps = {file: stamp(self.catalogue.folder / file) for model in put for file in model.apply}
        for name in out:
            self.catalogue.models.pop(name, None)
            self.asked.pop(name, None)
        async with self.queue.turn(CHANGE, surely=True):
            await self._to_its_end(self._put, put, stamps, replace)

    async def _put(self, put: Collection[Model], stamps: dict[str, Stamp], replace: bool) -> None:
        models, before = self.catalogue.models, self.stamps
        for model in put:
            if model.name in models and not replace:
                raise CaloraError("lora_name", "another name than those that are served", model.name, "remove it first")
        self.stamps = before | stamps
        try:
            self._fits(put)
            await self._load(self._chosen(*put))
        except BaseException:
            self.stamps = before
            raise
        for model in put:
            models[model.name], self.asked[model.name] = model, next(self.clock)

    async def _bring(self, model: Model) -> None:
        if not self.has(model):  # another request of this turn was first
            if changed := [file for file in model.apply if self._changed(file)]:
                fix = "export it again: the server looks at manifest.json"
                raise CaloraError(self.catalogue.folder / changed[0], "the file that was checked", "another one", fix)
            await self._load(self._chosen(model))

    async def _load(self, wanted: Mapping[str, Stamp]) -> None:
        """Have these LoRAs; where that fails, those of before."""
        if wanted == self.loaded and self.engine.alive:
            return
        if stamp(self.catalogue.base) != self.base or any(map(self._changed, self.catalogue.models[BASE_NAME].apply)):
            raise CaloraError(self.catalogue.base, "the file that was checked", "another one", "start the server again")
        before, self.loaded = self.loaded, {}
        try:
            await self.engine.load(self._paths(wanted))
        except CaloraError:
            await self.engine.load(self._paths(before))
            self.loaded = before
            raise
        self.loaded = dict(wanted)

    def _chosen(self, *first: Model) -> dict[str, Stamp]:
        """The LoRAs of the base, of these models, and of those that were asked for last, as long as there is room."""
        recent = sorted(self.catalogue.models.values(), key=lambda model: -self.asked.get(model.name, 0))
        files, left = dict.fromkeys(self.catalogue.models[BASE_NAME].apply), self.room
        for model in [*first, *recent]:
            new = [file for file in model.apply if file not in files]
            if not any(map(self._changed, new)) and (size := sum(self.stamps[file][0] for file in new)) <= left:
                files, left = files | dict.fromkeys(new), left - size
        return {file: self.stamps[file] for file in files}

    def _fits(self, models: Iterable[Model]) -> None:
        for model in models:
            own = set(model.apply) - set(self.catalogue.models[BASE_NAME].apply)
            if (size := sum(self.stamps[file][0] for file in own)) > self.room:
                found, least = f"{self.room / 1e6:g} MB", f"{size / 1e6:.3f} MB or more, for adapter {model.name}"
                raise CaloraError("--memory", least, found, "raise it, or leave the adapter out")

    def _changed(self, file: str) -> bool:
        return stamp(self.catalogue.folder / file) != self.stamps[file]

    def _paths(self, files: Iterable[str]) -> dict[str, Path]:
        return {file: self.catalogue.folder / file for file in files}

    async def _to_its_end(self, work: Callable[..., Awaitable[None]], *arguments: Any) -> None:
        """Do it, one after another; a turn is not left before, though who asked for it may have gone."""

        async def alone() -> None:
            async with self.lock:
                await work(*arguments)

        task, gone = asyncio.create_task(alone()), None
        self.changes.add(task)
        task.add_done_callback(self.changes.discard)
        while not task.done():
            try:
                await asyncio.wait({task})
            except asyncio.CancelledError as error:
                gone = error
        if gone:
            if not task.cancelled():
                task.exception()  # nobody reads it
            raise gone
        task.result()


def stamp(path: Path) -> Stamp:
    """By which another file of that name is told."""
    try:
        found = os.stat(path)
    except OSError:
        return NOTHING
    return found.st_size, found.st_mtime_ns, found.st_ino
