"""`calora chat`: a conversation with a base and its adapters, which change in its middle."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from typing import Any

from calora.device.catalogue import NoSuchModel
from calora.device.engine import Refused
from calora.device.screen import Pipe, Screen, Terminal, Timing
from calora.device.sources import Message, Source
from calora.errors import CaloraError
from calora.evaluation.choice import columns_of
from calora.models.tasks import Task

COMMANDS = {
    "/model NAME": "go on with another model, in the same conversation",
    "/models": "those that there are",
    "/reset": "forget what was said",
    "/help": "this list",
    "/quit": "end, as does Ctrl-D; Ctrl-C ends an answer that is being written",
}
HELP = (
    "Anything else is a text that is answered. An adapter that chooses tells how probable each of its answers is, for each"
    " text by itself. A text that begins with a slash needs a space before it."
)


class Conversation:
    """What was said, and with whom.

    Args:
        source: of the answers.
        options: of every answer that is written, as OpenAI names them.
        name: of the model at the start; None: the first one.
    """

    def __init__(self, source: Source, options: Mapping[str, Any], name: str | None = None) -> None:
        self.source, self.options, self.name = source, options, name or ""
        self.models: dict[str, Task | None] = {}
        self.messages: list[Message] = []

    async def open(self) -> None:
        """See which models there are; raises `CaloraError` where the chosen one is none of them."""
        self.models = await self.source.models()
        await self.switch(self.name or next(iter(self.models)))

    async def switch(self, name: str) -> None:
        """Go on with another model; raises `CaloraError` where there is none of that name."""
        if name not in self.models:
            self.models = await self.source.models()  # adapters come and go
        if name not in self.models:
            raise CaloraError("model", f"one of {', '.join(self.models)}", repr(name), "/model NAME, or --adapter NAME")
        self.name = name

    @property
    def chooses(self) -> Task | None:
        """The task of a model that chooses among answers."""
        task = self.models[self.name]
        return task if task is not None and task.scored else None

    @property
    def columns(self) -> list[str]:
        """What a text is asked for as: the columns of such a task where they are texts."""
        return [] if self.chooses is None or self.chooses.listed else columns_of(self.chooses)

    async def answer(self, lines: Sequence[str], screen: Screen) -> None:
        """Show the answer to a text, or to one text a column."""
        if self.chooses is None:
            await self._write(lines[0], screen)
        else:
            start = time.perf_counter()
            choice = await self.source.choose(self.name, given(self.chooses, lines))
            screen.choice(choice, time.perf_counter() - start)

    async def _write(self, text: str, screen: Screen) -> None:
        asked, said, times = [*self.messages, {"role": "user", "content": text}], list[str](), [time.perf_counter()]
        try:
            async with aclosing(self.source.write(self.name, asked, self.options)) as pieces:
                async for piece in pieces:
                    times.append(time.perf_counter())
                    said.append(piece)
                    screen.piece(piece)
            screen.done(timing(times))
        finally:
            if said:  # what was ended on the way was said too
                self.messages = [*asked, {"role": "assistant", "content": "".join(said)}]


def given(task: Task, lines: Sequence[str]) -> str | dict[str, Any]:
    """What was typed as the input of a task: a text, or a row, also as JSON where it has several columns.

    Raises:
        CaloraError: the task has several columns, and the text is no object with them.
    """
    columns = columns_of(task)
    if len(lines) == len(columns) > 1:
        return dict(zip(columns, lines, strict=True))
    if len(columns) == 1:
        return lines[0]
    try:
        found = json.loads(lines[0])
    except ValueError:
        found = None
    if not isinstance(found, dict):
        shape = json.dumps({name: [] if task.listed and name in task.answer_columns else "" for name in columns})
        raise CaloraError(f"input of task {task.name}", f"an object: {shape}", f"{lines[0]!r:.80}", "write it so")
    return found


def timing(times: Sequence[float]) -> Timing:
    """Of an answer that began at the first of these times and had a piece at each other one."""
    first = (times[1] if len(times) > 1 else time.perf_counter()) - times[0]
    return Timing(first, (len(times) - 2) / (times[-1] - times[1]) if len(times) > 2 else 0.0)


def chat(source: Source, options: Mapping[str, Any], name: str | None = None, screen: Screen | None = None) -> None:
    """Talk until the end of the input.

    Args:
        source: of the answers; it is closed at the end.
        options: of every answer that is written, as OpenAI names them.
        name: of the model at the start; None: the first one.
        screen: by default this process's own: a terminal, or a pipe.

    Raises:
        CaloraError: there is no such model; through a pipe, any mistake.
    """
    talk = Conversation(source, options, name)
    if screen is None:
        alone = sys.stdin.isatty() and sys.stdout.isatty()
        screen = Terminal(lambda typed: completions(talk, typed)) if alone else Pipe()
    with asyncio.Runner() as runner:
        try:
            runner.run(talk.open())
            screen.note(f"{', '.join(talk.models)}. /help says what may be typed.")
            while _turn(runner, talk, screen):
                pass
        finally:
            runner.run(source.close())


def _turn(runner: asyncio.Runner, talk: Conversation, screen: Screen) -> bool:
    """Read and answer; whether to go on."""
    try:
        lines = screen.read(talk.name, talk.columns)
    except EOFError:
        return False
    except KeyboardInterrupt:
        if screen.strict:
            raise
        screen.note("\n/quit or Ctrl-D ends.")
        return True
    try:
        if lines[0].startswith("/"):
            return _obey(lines[0].split(), runner, talk, screen)
        if lines[0].strip():
            runner.run(talk.answer(lines, screen))
    except KeyboardInterrupt:
        if screen.strict:
            raise
        screen.note("\nended")
    except (CaloraError, NoSuchModel, Refused) as error:
        if screen.strict:
            fix = "shorten the text, or look at what is served"
            raise error if isinstance(error, CaloraError) else CaloraError("chat", "an answer", error, fix) from None
        screen.error(str(error))
    return True


def _obey(words: Sequence[str], runner: asyncio.Runner, talk: Conversation, screen: Screen) -> bool:
    """Do what a command says; whether to go on."""
    match words:
        case ["/quit"]:
            return False
        case ["/help"]:
            screen.note("\n".join([*(f"{name:13}{about}" for name, about in COMMANDS.items()), HELP]))
        case ["/reset"]:
            talk.messages = []
            screen.note("Nothing was said.")
        case ["/models"]:
            talk.models = runner.run(talk.source.models())
            screen.models(talk.models, talk.name)
        case ["/model", name]:
            runner.run(talk.switch(name))
        case _:
            raise CaloraError("chat", f"one of {', '.join(COMMANDS)}", " ".join(words), "type /help")
    return True


def completions(talk: Conversation, typed: str) -> list[str]:
    """Commands that begin with what was typed."""
    lines = [*(f"/model {name}" for name in talk.models), *(line for line in COMMANDS if " " not in line)]
    return [line for line in lines if line.startswith(typed)]
