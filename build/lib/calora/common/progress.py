"""Progress: a bar with the time left in a terminal, a line now and then anywhere else (a log, a run's page)."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

SECONDS = 10.0  # between two lines
LINE = "{desc}: {n_fmt} of {total_fmt} {unit}, {elapsed} gone, {remaining} left{postfix}"


class _Lines:
    """A stream on which a bar's redrawing becomes lines; closing a bar draws its last one again."""

    last = ""

    def write(self, text: str) -> None:
        text = text.strip("\r\n ")
        if text and text != self.last:
            sys.stderr.write(f"{text}\n")
            self.last = text

    def flush(self) -> None:
        sys.stderr.flush()


def progress(items: Iterable[Any], title: str | None, unit: str, total: int | None = None, done: int = 0) -> Any:
    """Iterate over `items` and show how far it is.

    Args:
        title: what is being done; None shows nothing.
        total, done: number of items in all, and of those that an earlier run has done.
    """
    look: dict[str, Any] = {"dynamic_ncols": True}
    if not sys.stderr.isatty():
        look = {"file": _Lines(), "mininterval": SECONDS, "delay": SECONDS, "position": 0, "bar_format": LINE}
    return tqdm(items, desc=title, unit=unit, total=total, initial=done, disable=title is None, **look)
