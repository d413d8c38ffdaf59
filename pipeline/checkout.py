"""A checkout of its own for each run: a git worktree of one commit that shares the DVC cache of the project.

What a run changes stays there, and ends as a DVC experiment, which git keeps for all worktrees alike.
"""

from __future__ import annotations

import configparser
import fcntl
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from uuid import uuid4

from calora.errors import CaloraError

RUNS, UNFINISHED = Path(".cache/runs"), Path(".cache/unfinished")
KEPT_FOR = 14 * 24 * 3600  # seconds
WRITTEN_BY_RUNS = ("dvc.lock", "results/")


def git(folder: Path, *arguments: str, stdin: bytes | None = None) -> str:
    """Output of a git command; raises `CaloraError` with git's own words."""
    done = subprocess.run(["git", *arguments], cwd=folder, input=stdin, capture_output=True)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"]
        told = next((line for line in lines if line.startswith(("fatal:", "error:"))), lines[-1])
        raise CaloraError(f"git {' '.join(arguments[:2])}", "success", told, "mend what git complains of")
    return done.stdout.decode(errors="replace")


def commit_of(root: Path, name: str) -> str:
    """The commit that a branch, tag, experiment or hash names.

    Raises:
        CaloraError: the project is no git repository, has no commit yet, or not this one.
    """
    if subprocess.run(["git", "rev-parse", "--git-dir"], cwd=root, capture_output=True).returncode:
        fix = "git init && git add -A && git commit -m start"
        raise CaloraError(root, "a git repository: a run works in a checkout of its own", "none", fix)
    place = experiments(root).get(name, name)
    done = subprocess.run(
        ["git", "rev-parse", "--verify", "--quiet", "--end-of-options", f"{place}^{{commit}}"],
        cwd=root, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise CaloraError(
            "commit", "a commit of this repository", repr(name), "name a branch, a tag, an experiment or a hash"
        )
    return done.stdout.strip().splitlines()[-1]


def experiments(root: Path, commit: str | None = None) -> dict[str, str]:
    """DVC's experiments, oldest first: name -> its reference in git; of all commits, or under one."""
    under = "refs/exps" if commit is None else f"refs/exps/{commit[:2]}/{commit[2:]}"
    found = git(root, "for-each-ref", "--sort=committerdate", "--format=%(refname)", under).splitlines()
    return {reference.rsplit("/", 1)[-1]: reference for reference in found if reference.count("/") == 4}


def uncommitted(root: Path) -> list[str]:
    """Changed and new files of the working tree that no commit holds; what runs themselves write does not count."""
    lines = git(root, "status", "--porcelain", "--untracked-files=all", "-z", ".").split("\0")
    return [line[3:] for line in lines if line and not line[3:].startswith(WRITTEN_BY_RUNS)]


def refuse(changed: list[str], fix: str) -> None:
    """Raise `CaloraError` where the working tree has changes that a run would not see."""
    if changed:
        raise CaloraError("working tree", "no uncommitted changes", ", ".join(changed[:5]), fix)


@contextmanager
def checkout(root: Path, commit: str, take_along: bool) -> Iterator[Path]:
    """A worktree of `commit` under .cache/runs, which goes away at the end; yields the project's folder in it.

    Args:
        take_along: bring the uncommitted changes of the working tree.
    """
    sweep(root)
    folder = root / RUNS / uuid4().hex[:12]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with owned(folder):
        try:
            git(root, "worktree", "add", "--quiet", "--detach", str(folder), commit)
            inside = folder / git(root, "rev-parse", "--show-prefix").strip()
            if take_along:
                _bring_changes(root, inside)
            _share_cache(root, inside)
            yield inside
        finally:
            remove(root, folder)


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
    path = folder.with_name(f"{folder.name}.lock")
    with path.open("w") as file:
        mine = _locked(file)
        try:
            yield mine
        finally:
            if mine:
                path.unlink(missing_ok=True)


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    # The file may have been removed by its last owner between our opening and locking it.
    return Path(file.name).exists() and os.fstat(file.fileno()).st_ino == Path(file.name).stat().st_ino


def _last_touched(folder: Path) -> float:
    """When anything in a folder changed last; now, where files come and go."""
    try:
        return max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
    except FileNotFoundError:
        return time.time()


def _bring_changes(root: Path, inside: Path) -> None:
    """The working tree's changes against its HEAD, and its new files that git does not ignore."""
    changes = subprocess.run(
        ["git", "diff", "HEAD", "--binary", "--relative", "."], cwd=root, capture_output=True, check=True
    ).stdout
    if changes:
        git(inside, "apply", "--whitespace=nowarn", "-", stdin=changes)
    for name in git(root, "ls-files", "--others", "--exclude-standard", "-z").split("\0"):
        if name:
            (inside / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, inside / name, follow_symlinks=False)


def _share_cache(root: Path, inside: Path) -> None:
    """Let DVC there use the project's cache and local settings, and the stages its downloads."""
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
