"""The stages of a checkout, read from DVC: their order, which of them have nothing to do, and running one."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import chdir
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from calora.errors import CaloraError
from pipeline.process import DVC, Processes

if TYPE_CHECKING:
    from dvc.repo import Repo

HINTS = (  # of DVC, for somebody at a terminal
    "To track the changes", "git add ", "To enable auto staging", "dvc config core.autostage", "Use `dvc push`", "Updating lock file",
)  # fmt: skip
Begun = TypeVar("Begun")
BUSY = ("Unable to acquire lock", "is busy, it is being blocked by")
NO_ANSWER = ("expected an answer, ", "expected the package index to answer")  # what stages say of a broken network
WAITS = (2, 5, 15)  # seconds before a stage is tried again


class StageFailed(Exception):
    """A stage ended with an error; the message is its last words, `code` the exit code of DVC."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


class TryAgain(StageFailed):
    """Another DVC process holds a lock that the stage needs, or the network broke: trying again can help."""


def stages(folder: Path) -> dict[str, list[str]]:
    """Stage -> the stages that it needs, in an order in which each comes after those."""
    from dvc.repo import Repo

    with Repo(str(folder)) as repo:
        return _graph(repo)


def standing(folder: Path) -> tuple[dict[str, list[str]], set[str]]:
    """`stages`, and those whose outputs are there and whose inputs are as they were, down to the first that has something to do."""
    from dvc.repo import Repo, lock_repo

    # Its status names stages as seen from here, and reads all of them anew unless the lock is held.
    with chdir(folder), Repo(str(folder)) as repo, lock_repo(repo):
        graph = _graph(repo)
        return graph, _same(graph, repo.status())


def _graph(repo: Repo) -> dict[str, list[str]]:
    import networkx

    graph = repo.index.graph  # an edge goes from a stage to one that it needs
    order = networkx.lexicographical_topological_sort(graph.reverse(copy=True), key=_name)
    return {_name(stage): sorted(_name(needed) for needed in graph.successors(stage)) for stage in order}


def _name(stage: Any) -> str:
    """As `dvc stage list` has it at the top of the project, wherever this process stands."""
    own: str = getattr(stage, "name", None) or ""
    return own if stage.path_in_repo == "dvc.yaml" else f"{stage.path_in_repo}{':' if own else ''}{own}"


def with_needed(graph: Mapping[str, list[str]], wanted: list[str]) -> dict[str, list[str]]:
    """The part of a graph that some stages need; `distill` means each `distill@...`. All of it, where none is named.

    Raises:
        CaloraError: no stage is called so.
    """
    todo = []
    for name in wanted:
        found = [stage for stage in graph if name in (stage, stage.split("@")[0])]
        if not found:
            raise CaloraError("stages", "names of `dvc stage list`", repr(name), "correct its spelling")
        todo += found
    needed: set[str] = set() if wanted else set(graph)
    while todo:
        stage = todo.pop()
        if stage not in needed:
            needed.add(stage)
            todo += graph[stage]
    return {stage: needs for stage, needs in graph.items() if stage in needed}


def in_turn(
    graph: Mapping[str, list[str]], start: Callable[[str, list[Begun]], Begun], over: Callable[[Begun], bool]
) -> dict[str, Begun]:
    """Start each stage as soon as those that it needs are over; return when all are.

    Args:
        start: begins a stage, given what it returned for each that the stage needs, and does not wait for it.
        over: whether a stage that has begun has ended, however it did.
    """
    begun: dict[str, Begun] = {}
    while len(begun) < len(graph) or not all(over(one) for one in begun.values()):
        for stage, needs in graph.items():
            if stage not in begun and all(needed in begun and over(begun[needed]) for needed in needs):
                begun[stage] = start(stage, [begun[needed] for needed in needs])
        time.sleep(0.1)  # a signal is answered between two looks
    return begun


def restore(folder: Path, graph: Mapping[str, list[str]], processes: Processes) -> set[str]:
    """Bring the outputs that dvc.lock names, so far as the cache has them; returns the stages that have nothing to do.

    Those whose outputs are at hand nowhere are forgotten in dvc.lock (see `forget`).
    """
    processes.run([*DVC, "checkout", "--quiet", "--allow-missing"], folder, lambda _: None)
    changed = _changed(folder, processes)
    forget(folder, {stage for stage in graph if _lost(changed.get(stage, []))})
    return _same(graph, changed)


def _changed(folder: Path, processes: Processes) -> dict[str, list[Any]]:
    lines: list[str] = []
    failed = processes.run([*DVC, "status", "--json"], folder, lines.append)
    said = next((line for line in lines if line.startswith("{")), None)
    if failed or said is None:
        found = (lines or ["no output"])[-1]
        raise CaloraError("dvc status", "the state of the stages", found, "mend dvc.yaml or params.yaml")
    changed: dict[str, list[Any]] = json.loads(said)
    return changed


def _same(graph: Mapping[str, list[str]], changed: Mapping[str, Any]) -> set[str]:
    same: set[str] = set()
    for stage, needs in graph.items():
        if stage not in changed and all(needed in same for needed in needs):
            same.add(stage)
    return same


def forget(folder: Path, lost: set[str]) -> None:
    """Take stages whose outputs are at hand nowhere out of dvc.lock: DVC then asks the cache of earlier runs for them.

    It does not ask for a stage that dvc.lock holds as it is: where dvc.lock was committed on a machine whose processor
    rounds otherwise, every run would compute that stage anew.
    """
    from dvc.utils.serialize import modify_yaml

    path = folder / "dvc.lock"
    if lost and path.exists():
        with modify_yaml(str(path)) as locked:
            for stage in lost:
                locked.get("stages", {}).pop(stage, None)


def _lost(changes: list[Any]) -> bool:
    """Whether DVC's status of a stage says that outputs are missing, here and in the cache."""
    outputs = [
        state for change in changes if isinstance(change, dict) for state in change.get("changed outs", {}).values()
    ]
    return any(state in ("deleted", "not in cache") for state in outputs)


def run_stage(stage: str, folder: Path, processes: Processes, say: Callable[[str], None], pull: bool = False) -> str:
    """`dvc repro --single-item`, its output line by line to `say`; `pull` takes what the remote has already.

    Returns:
        What became of it: `ran`, `restored` (from the cache of earlier runs) or `unchanged`.

    Raises:
        StageFailed: it failed; `TryAgain` where that can help.
        Stopped: the run is being stopped.
    """
    lines: list[str] = []

    def keep(line: str) -> None:
        lines.append(line)
        if not any(line.strip().startswith(words) for words in HINTS):
            say(line)

    command = [*DVC, "--wait-for-lock", "repro", "--single-item", *(["--pull"] if pull else []), stage]
    if code := processes.run(command, folder, keep):
        said = next((line for line in lines if line.startswith("error: ")), None)
        said = said or next((line for line in reversed(lines) if line.startswith("ERROR: ")), None)
        said = said or (lines or ["no output"])[-1]
        passing = any(words in said for words in NO_ANSWER) or any(words in line for line in lines for words in BUSY)
        raise (TryAgain if passing else StageFailed)(f"{stage}: {said}", code)
    if any(line.startswith("Running stage") for line in lines):
        return "ran"
    return "restored" if any("is cached - skipping run" in line for line in lines) else "unchanged"
