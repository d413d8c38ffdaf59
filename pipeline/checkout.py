"""A checkout of its own for each run: a git worktree of one commit that shares the DVC cache of the project.

What a run changes stays there, and ends as a DVC experiment, which git keeps for all worktrees alike.
"""

from __future__ import annotations

import configparser
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import yaml

from calora.common.files import locked
from calora.errors import CaloraError
from pipeline.repository import bring_changes, bring_submodules, check_can_keep, git, prefix

RUNS, UNFINISHED = Path(".cache/runs"), Path(".cache/unfinished")
OWN, DOWNLOADS = Path("own"), (Path(".cache/downloads"), Path(".cache/huggingface"))
NAMES_OF_FILES = ("path", "train", "validation", "test")  # in sections whose source is `files` or `path`
KEPT_FOR = 14 * 24 * 3600  # seconds


@contextmanager
def checkout(root: Path, commit: str, take_along: bool) -> Iterator[Path]:
    """A worktree of `commit` under .cache/runs, which goes away at the end; yields the project's folder in it.

    Args:
        take_along: bring the uncommitted changes of the working tree.
    """
    check_can_keep(root)
    sweep(root)
    folder = root / RUNS / uuid4().hex[:12]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with owned(folder):
        try:
            git(root, "worktree", "add", "--quiet", "--detach", str(folder), commit)
            inside = folder / prefix(root)
            if take_along:
                bring_changes(root, inside)
            bring_submodules(root, inside)
            _bring_own(root, inside)
            _share_cache(root, inside)
            yield inside
        finally:
            remove(root, folder)


def check_files(root: Path, inside: Path) -> None:
    """Raise `CaloraError` where a file that params.yaml names is not in the checkout, before any stage runs."""
    params = yaml.safe_load((inside / "params.yaml").read_text(encoding="utf-8"))
    sets = params.get("data", {}).get("sets", {})
    for name in set(sets) - set(params.get("tasks", [])):
        del sets[name]  # no task of this run
    for key, name, certainly in _texts(params):
        ignored = os.path.exists(root / name)
        if (certainly or ignored) and not os.path.exists(inside / name):
            found = "one that git ignores, which a run has not" if ignored else "no such file"
            fix = f"put it into {OWN}/, or commit it" if ignored else f"correct the path, or put the file into {OWN}/"
            raise CaloraError(f"params.yaml: {key}", f"the file {name}", found, fix)


def _texts(value: Any, key: str = "", files: bool = False) -> Iterator[tuple[str, str, bool]]:
    """Each text in params.yaml: its key, with dots, itself, and whether it certainly names a file."""
    if isinstance(value, dict):
        ours = value.get("source") in ("files", "path")
        for name, one in value.items():
            yield from _texts(one, f"{key}.{name}" if key else str(name), ours and name in NAMES_OF_FILES)
    elif isinstance(value, list):
        for one in value:
            yield from _texts(one, key, files)
    elif isinstance(value, str):
        yield key, value, files or value.startswith(f"{OWN}/")


@contextmanager
def resumable(root: Path, inside: Path) -> Iterator[None]:
    """Keep the checkpoints of stages outside of the checkout until a run ends well: the same run started again goes on.

    Runs are the same if every file of the checkout is.

    Raises:
        CaloraError: the same run is going on elsewhere.
    """
    git(inside, "add", "--all", ".")
    kept = (root / UNFINISHED).resolve() / git(inside, "write-tree").strip()
    kept.mkdir(parents=True, exist_ok=True)
    with owned(kept) as mine:
        if not mine:
            raise CaloraError(
                "run", "no run of the same commit and settings", "one that is going on", "wait for its result"
            )
        (inside / "checkpoints").symlink_to(kept)
        yield
        shutil.rmtree(kept, ignore_errors=True)


def sweep(root: Path) -> None:
    """Remove the checkouts that killed runs left behind, and checkpoints that no run has gone on from for two weeks."""
    for lock in (root / RUNS).glob("*.lock"):
        folder = lock.with_suffix("")
        with owned(folder) as abandoned:
            if abandoned:
                remove(root, folder)
    for kept in (root / UNFINISHED).glob("*/"):
        if time.time() - _last_touched(kept) > KEPT_FOR:
            with owned(kept) as abandoned:
                if abandoned:
                    shutil.rmtree(kept, ignore_errors=True)


def remove(root: Path, folder: Path) -> None:
    """Remove a checkout, whatever state it is in."""
    shutil.rmtree(folder, ignore_errors=True)
    git(root, "worktree", "prune")


@contextmanager
def owned(folder: Path) -> Iterator[bool]:
    """Whether nobody else alive has this checkout; it is then ours until the end. The system drops a dead process's lock."""
    with locked(folder.with_name(f"{folder.name}.lock"), wait=False) as ours:
        yield ours


def _last_touched(folder: Path) -> float:
    """When anything in a folder changed last; now, where files come and go."""
    try:
        return max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
    except FileNotFoundError:
        return time.time()


def _bring_own(root: Path, inside: Path) -> None:
    """Links to the files of `own/`, which git ignores, and to the folders of downloads.

    Each file is linked, not their folder: DVC finds the same hash behind a linked file, and none behind a linked folder.
    """
    for folder in DOWNLOADS:
        (root / folder).mkdir(parents=True, exist_ok=True)
        (inside / folder).parent.mkdir(parents=True, exist_ok=True)
        (inside / folder).symlink_to((root / folder).resolve())
    ignored = git(root, "ls-files", "--others", "--ignored", "--exclude-standard", "-z", "--", str(OWN))
    for name in map(Path, filter(None, ignored.split("\0"))):
        (inside / name).parent.mkdir(parents=True, exist_ok=True)
        (inside / name).symlink_to((root / name).resolve())


def _share_cache(root: Path, inside: Path) -> None:
    """Let DVC there use the project's cache and local settings."""
    from dvc.repo import Repo

    with Repo(str(root)) as repo:
        cache = Path(repo.cache.local.path).parent.parent  # .dvc/cache, of .dvc/cache/files/md5
    config = configparser.ConfigParser()
    config.read(root / ".dvc/config.local", encoding="utf-8")
    if "cache" not in config:
        config["cache"] = {}
    config["cache"]["dir"] = str(cache)
    with (inside / ".dvc/config.local").open("w", encoding="utf-8") as file:
        config.write(file)
