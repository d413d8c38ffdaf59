"""How `calora chat` looks: on a terminal, and through a pipe, where a line is read and an answer is written and nothing else."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rich.bar import Bar
from rich.console import Console
from rich.table import Table

from calora.evaluation.choice import Choice
from calora.models.tasks import Task

try:
    import readline  # `input` then edits, and remembers
except ImportError:  # Windows
    readline = None  # type: ignore[assignment]

SHOWN = 10  # answers of a choice
WIDTH = 24  # of a bar, in characters


@dataclass
class Timing:
    """Of an answer.

    Args:
        first: seconds to its first piece.
        rate: pieces a second after it; 0 where there are too few. A piece is a token, but for characters of several.
    """

    first: float
    rate: float

    def __str__(self) -> str:
        rate = f", {self.rate:.0f} tokens/s" if self.rate else ""
        return f"first token after {1000 * self.first:.0f} ms{rate}"


class Screen(Protocol):
    """What a conversation reads from and is shown on."""

    strict: bool  # whether a mistake ends the conversation

    def read(self, name: str, columns: Sequence[str]) -> list[str]:
        """The next text: a line, or one for each column; raises `EOFError` at the end."""
        ...

    def piece(self, text: str) -> None:
        """A piece of an answer."""
        ...

    def done(self, timing: Timing) -> None:
        """An answer is whole."""
        ...

    def choice(self, choice: Choice, seconds: float) -> None:
        """An answer of a task that chooses."""
        ...

    def note(self, text: str) -> None:
        """What is no answer."""
        ...

    def models(self, models: Mapping[str, Task | None], chosen: str) -> None:
        """Those that there are."""
        ...

    def error(self, text: str) -> None:
        """A mistake, and the conversation goes on."""
        ...


def clean(text: str) -> str:
    """Without what a terminal would obey: a model may write any character."""
    return "".join(letter for letter in text if letter.isprintable() or letter in "\n\t")


class Terminal:
    """A terminal of a person.

    Args:
        complete: the words that may stand where a line that begins with `/` is being typed; Tab asks for them.
    """

    strict = False

    def __init__(self, complete: Callable[[str], Sequence[str]], console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        if readline is not None:
            readline.set_completer_delims("")
            readline.set_completer(lambda typed, number: [*complete(typed), None][number] if number < 99 else None)
            readline.parse_and_bind("tab: complete")

    def read(self, name: str, columns: Sequence[str]) -> list[str]:
        """See `Screen`."""
        heads = [f"{name} {column}" for column in columns] if len(columns) > 1 else [name]
        lines = [input(self._prompt(heads[0]))]
        if not lines[0].strip() or lines[0].startswith(("/", "{")):
            return lines
        return [*lines, *(input(self._prompt(head)) for head in heads[1:])]

    def _prompt(self, text: str) -> str:
        if readline is None or self.console.no_color:
            return f"{text}> "
        return f"\001\033[1;36m\002{text}>\001\033[0m\002 "  # \001 and \002: readline does not count what is between

    def piece(self, text: str) -> None:
        """See `Screen`."""
        self._print(clean(text), end="", soft_wrap=True)

    def done(self, timing: Timing) -> None:
        """See `Screen`."""
        self._print("")
        self._print(str(timing), style="dim")

    def choice(self, choice: Choice, seconds: float) -> None:
        """See `Screen`."""
        grid = Table.grid(padding=(0, 2))
        found = sorted(zip(choice.probabilities, choice.answers, strict=True), key=lambda one: -one[0])
        for place, (probability, answer) in enumerate(found[:SHOWN]):
            bar = Bar(1.0, 0.0, probability, width=WIDTH, color="cyan" if place == 0 else "bright_black")
            grid.add_row(clean(answer), f"{100 * probability:5.1f} %", bar, style="bold" if place == 0 else "")
        self.console.print(grid, markup=False)
        rest = f"{len(found) - SHOWN} more; " if len(found) > SHOWN else ""
        self._print(f"{rest}{choice.tokens} tokens read, {1000 * seconds:.0f} ms", style="dim")

    def note(self, text: str) -> None:
        """See `Screen`."""
        self._print(text, style="dim")

    def models(self, models: Mapping[str, Task | None], chosen: str) -> None:
        """See `Screen`."""
        grid = Table.grid(padding=(0, 2))
        for name, task in models.items():
            grid.add_row(">" if name == chosen else "", name, describe(task), style="bold" if name == chosen else "")
        self.console.print(grid, markup=False)

    def error(self, text: str) -> None:
        """See `Screen`."""
        self._print(clean(text), style="red")

    def _print(self, text: str, **options: Any) -> None:
        self.console.print(text, markup=False, **options)


class Pipe:
    """Text without looks; what is no answer is left out."""

    strict = True

    def read(self, name: str, columns: Sequence[str]) -> list[str]:
        """See `Screen`."""
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return [line.removesuffix("\n").removesuffix("\r")]

    def piece(self, text: str) -> None:
        """See `Screen`."""
        print(text, end="", flush=True)

    def done(self, timing: Timing) -> None:
        """See `Screen`."""
        print(flush=True)

    def choice(self, choice: Choice, seconds: float) -> None:
        """See `Screen`."""
        print(f"{choice.answer}\t{max(choice.probabilities):.4f}", flush=True)

    def note(self, text: str) -> None:
        """See `Screen`."""

    def models(self, models: Mapping[str, Task | None], chosen: str) -> None:
        """See `Screen`."""
        for name, task in models.items():
            print(f"{name}\t{describe(task)}", flush=True)

    def error(self, text: str) -> None:
        """See `Screen`: never asked of one that is strict."""
        raise AssertionError(text)


def describe(task: Task | None) -> str:
    """What a model does with a text."""
    if task is None or not task.scored:
        return "chats"
    return f"chooses: {', '.join(answer.strip() for answer in task.answers)}" if task.fixed else "chooses among a row's"
