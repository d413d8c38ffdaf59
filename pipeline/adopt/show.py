"""Tell what was found, what changes and what it takes: a screen of it."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from pipeline.adopt.outlook import Row
from pipeline.adopt.wanted import Said

WIDTH = 110
COLOURS = {"+": "green", "-": "red", "@": "cyan"}


def show_found(console: Console, said: Said) -> None:
    """What was found, part by part, and what could not be told: it is to be checked."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for part, text in said.found:
        told = Text(text)  # a file's name or a column's is no markup
        if part in ("base", "adapter"):
            told.stylize("bold", 0, text.index("\n"))
        table.add_row(part, told)
    for number, text in enumerate(said.unsure):
        table.add_row("[yellow]to check[/]" if number == 0 else "", escape(text))
    console.print(table)


def show_changes(console: Console, diff: str, dry: bool, placed: Sequence[object]) -> None:
    """The diff of params.yaml, and what lies in own/ now."""
    console.print()
    if placed:
        verb = "would be put into own/" if dry else "put into own/"
        console.print(f"{verb}: {', '.join(map(str, placed))}", markup=False, soft_wrap=True)
    if diff:
        console.print(f"params.yaml {'would change' if dry else 'changed'}:")
        for line in diff.splitlines()[2:]:
            console.print(line, style=COLOURS.get(line[:1], "dim"), markup=False, soft_wrap=True)
    else:
        console.print("params.yaml: nothing to change")


def show_outlook(console: Console, rows: Sequence[Row], chosen: Sequence[str], about: str) -> None:
    """A line for each recipe; those of the run stand out."""
    console.print()
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("recipe")
    for title in ("MB on disk", "GB memory", "compress, min", "all stages, min"):
        table.add_column(title, justify="right")
    for row in (row for row in rows if not row.refused):
        style = "bold green" if row.name in chosen else ""
        numbers = (f"{row.megabytes:.1f}", f"{row.memory:.1f}", minutes(row.compress), minutes(row.whole))
        table.add_row(row.name, *numbers, style=style)
    console.print(table)
    for reason in dict.fromkeys(row.refused for row in rows if row.refused):
        names = ", ".join(row.name for row in rows if row.refused == reason)
        console.print(f"[dim]not for this base: {names} ({escape(reason)})[/]", soft_wrap=True, highlight=False)
    console.print(f"[dim]{about}[/]", highlight=False)


def minutes(value: float) -> str:
    """Two digits of it: no more is known."""
    return f"{value:.1f}" if value < 1 else f"{float(f'{value:.2g}'):.0f}"
