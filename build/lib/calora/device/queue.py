"""Whose turn it is: requests that wait for a model of which only one adapter runs at a time.

llama.cpp puts one adapter into a batch, and with several at once it lets those in higher slots wait until the first has
finished. So one adapter has the model, with up to `slots` requests together; adapters with waiting requests take turns, and
while others wait a turn is `slots` requests. Whoever waits sees at most one such turn of each other adapter before their own.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Full(Exception):
    """As many requests wait as may."""


class Late(Exception):
    """A request waited as long as it may."""


class AdapterQueue:
    """Turns, by adapter.

    Args:
        slots: requests that run at a time, >= 1.
        longest: requests that may wait, >= 0.
        patience: seconds that one may wait.
    """

    def __init__(self, slots: int, longest: int, patience: float) -> None:
        self.slots, self.longest, self.patience = slots, longest, patience
        self.waiting: dict[str, deque[asyncio.Future[None]]] = {}  # in the order in which adapters have their turns
        self.adapter: str | None = None  # whose turn it is
        self.running = 0
        self.taken = 0  # requests of this turn

    @property
    def length(self) -> int:
        """Requests that wait."""
        return sum(map(len, self.waiting.values()))

    @asynccontextmanager
    async def turn(self, adapter: str, surely: bool = False) -> AsyncIterator[None]:
        """Wait for a turn, and have it for the time of the block.

        Args:
            adapter: whose turn it is; no other one has the model then.
            surely: however many wait, and however long it takes.

        Raises:
            Full: too many wait.
            Late: it took too long.
        """
        await self._wait(adapter, surely)
        try:
            yield
        finally:
            self._leave()

    async def _wait(self, adapter: str, surely: bool) -> None:
        ticket = asyncio.get_running_loop().create_future()
        self.waiting.setdefault(adapter, deque()).append(ticket)
        self._admit()
        if not ticket.done() and not surely and self.length > self.longest:
            self._forget(adapter, ticket)
            raise Full
        try:
            async with asyncio.timeout(None if surely else self.patience):
                await ticket
        except BaseException as error:
            if ticket.done() and not ticket.cancelled():  # its turn came just as it was given up
                self._leave()
            else:
                self._forget(adapter, ticket)
            if isinstance(error, TimeoutError):
                raise Late from None
            raise

    def _forget(self, adapter: str, ticket: asyncio.Future[None]) -> None:
        tickets = self.waiting.get(adapter, deque())
        if ticket in tickets:
            tickets.remove(ticket)
        if not tickets:
            self.waiting.pop(adapter, None)
        self._admit()  # those who stood back for it may go on

    def _leave(self) -> None:
        self.running -= 1
        self._admit()

    def _admit(self) -> None:
        """Let those in whose turn it is."""
        while self.running < self.slots and (adapter := self._next()) is not None:
            tickets = self.waiting.pop(adapter)
            ticket = tickets.popleft()
            if tickets:
                self.waiting[adapter] = tickets  # at the end of the line
            if ticket.done():  # given up, and about to be forgotten
                continue
            if adapter != self.adapter or not self.running:
                self.adapter, self.taken = adapter, 0
            self.running += 1
            self.taken += 1
            ticket.set_result(None)

    def _next(self) -> str | None:
        """The adapter that a further request may have now."""
        if not self.running:
            return next(iter(self.waiting), None)
        alone = not self.waiting.keys() - {self.adapter}
        mine = self.adapter in self.waiting and (alone or self.taken < self.slots)
        return self.adapter if mine else None
