"""How long each stage took: from the stages themselves, or from what DVC says while it runs them."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

# DVC's words -> what becomes of the stage
SAID = {
    "ran": r"Running stage '(.+)':",
    "cached": r"Stage '(.+)' is cached - skipping run.*",
    "": r"Stage '(.+)' didn't change.*",
}


@dataclass
class Times:
    """Stage -> seconds, and whether it `ran` or was `cached`."""

    took: dict[str, tuple[float, str]] = field(default_factory=dict)

    @contextmanager
    def of(self, stage: str) -> Iterator[dict[str, str]]:
        """Measure a stage; its `what` is to be set where it did not run."""
        began, found = time.monotonic(), {"what": "ran"}
        try:
            yield found
        finally:
            self.add(stage, time.monotonic() - began, found["what"])

    def add(self, stage: str, seconds: float, what: str) -> None:
        """Keep one, unless there was nothing to do."""
        if what in ("ran", "cached"):
            self.took[stage] = (seconds, what)

    def show(self) -> None:
        """A table, the longest first; nothing where no stage had anything to do."""
        if not self.took:
            return
        table = Table("stage", "what", box=None, pad_edge=False)
        for title in ("seconds", "share"):
            table.add_column(title, justify="right")
        whole = sum(seconds for seconds, _ in self.took.values()) or 1.0
        for stage, (seconds, what) in sorted(self.took.items(), key=lambda item: -item[1][0]):
            table.add_row(stage, what, f"{seconds:.1f}", f"{seconds / whole:.0%}")
        Console().print(table)


class Clock(logging.Handler):
    """Listens to DVC: a stage lasts from the line that names it to the next such line, or to `stop`."""

    def __init__(self, times: Times) -> None:
        super().__init__(logging.INFO)
        self._times = times
        self._now: tuple[str, str, float] | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """A line of DVC's."""
        for what, words in SAID.items():
            if found := re.fullmatch(words, record.getMessage()):
                self.stop()
                self._now = (found[1], what, time.monotonic())

    def stop(self) -> None:
        """The stage that was under way is over."""
        if self._now:
            stage, what, began = self._now
            self._times.add(stage, time.monotonic() - began, what)
        self._now = None
