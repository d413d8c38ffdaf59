"""A checkout becomes a DVC experiment, under a name that no other has."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path

from filelock import FileLock

from pipeline.graph import StageFailed
from pipeline.process import DVC, Processes
from pipeline.repository import experiments, named

LOCK = Path(".cache/saving.lock")


def save_experiment(root: Path, folder: Path, name: str, processes: Processes, say: Callable[[str], None]) -> str:
    """Keep the checkout as a DVC experiment under its commit, and return its name: with a number where it was taken.

    Runs that end together choose and save one after another.

    Raises:
        StageFailed: DVC could not save it.
    """
    with FileLock(root / LOCK):
        taken = experiments(root)
        numbered = (name if number == 1 else f"{name}-{number}" for number in count(1))
        free = next(name for name in numbered if name not in taken and not named(root, name))
        if processes.run([*DVC, "exp", "save", "--name", free, "--include-untracked", "results"], folder, say):
            raise StageFailed("the experiment could not be saved; its results are in DVC's cache")
        return free
