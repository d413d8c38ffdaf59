"""What a server has: a folder and its runtime, and beside it another folder that it is compared with."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

from calora.device.catalogue import Catalogue, Model, unknown
from calora.device.limits import Limits
from calora.device.pool import Pool
from calora.errors import CaloraError

REFERENCE = "reference/"  # in front of the names of what is compared with


class OutOfTime(Exception):
    """A request ran as long as it may."""


class Served:
    """An exported folder as requests see it.

    Args:
        pool: its models, and what runs them.
        limits: of requests.
        prefix: in front of the names of its models.
    """

    def __init__(self, pool: Pool, limits: Limits, prefix: str = "") -> None:
        self.pool, self.limits, self.prefix = pool, limits, prefix
        self.engine = pool.engine

    @asynccontextmanager
    async def turn(self, model: Model) -> AsyncIterator[None]:
        """The model's turn, for as long as a request may run."""
        async with self.pool.turn(model):
            try:
                async with asyncio.timeout(self.limits.seconds):
                    yield
            except TimeoutError:
                raise OutOfTime from None

    def described(self, model: Model, created: int) -> dict[str, Any]:
        """As /v1/models has it, vLLM's `max_model_len` among it."""
        return {
            "id": self.prefix + model.name, "object": "model", "created": created, "owned_by": "calora",
            "compressed": self.pool.catalogue.compressed, "reference": bool(self.prefix),
            "resident": self.pool.has(model), "bytes": {"base": model.base_bytes, "adapter": model.adapter_bytes},
            "max_model_len": self.limits.context, "max_tokens": self.limits.tokens,
            **({"method": model.method, "task": model.task.to_json()} if model.task else {}),
        }  # fmt: skip


class Models:
    """All models of a server, by name: those of the folder, and those of what it is compared with, if anything."""

    def __init__(self, *served: Served) -> None:
        self.served = served

    def __iter__(self) -> Iterator[tuple[Served, Model]]:
        return ((served, model) for served in self.served for model in served.pool.catalogue.models.values())

    def __getitem__(self, name: str) -> tuple[Served, Model]:
        """A model, and where it is; raises `NoSuchModel`."""
        known = {served.prefix + model.name: (served, model) for served, model in self}
        if name not in known:
            raise unknown(name, known)
        return known[name]


def check_reference(served: Catalogue, reference: Catalogue) -> None:
    """Raise `CaloraError` unless a reference is of the base that the served one was made of."""
    if served.uncompressed != reference.uncompressed:
        expected = f"an export of the base that {served.folder} was made of, {served.uncompressed}"
        fix = "export that base, or leave out --reference"
        raise CaloraError(f"--reference {reference.folder}", expected, reference.uncompressed, fix)
