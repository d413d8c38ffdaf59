"""What git says of the project: the same in any git, whatever its user has set, and in a folder of a larger repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from calora.errors import CaloraError

WRITTEN_BY_RUNS = ("dvc.lock", "results/")
# What a user may have set for the eyes, or for commits by hand, and what would change or refuse what is read here.
NEUTRAL = {
    "color.ui": "false", "core.quotePath": "false", "core.safecrlf": "false", "core.hooksPath": os.devnull,
    "core.fsmonitor": "false", "advice.addEmbeddedRepo": "false", "status.submoduleSummary": "false",
    "diff.ignoreSubmodules": "none",
}  # fmt: skip
# Set where a git hook or another tool started this: they would mean that tool's repository.
FOREIGN = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX", "GIT_COMMON_DIR", "GIT_OBJECT_DIRECTORY", "GIT_NAMESPACE",
           "GIT_LITERAL_PATHSPECS", "GIT_GLOB_PATHSPECS", "GIT_NOGLOB_PATHSPECS", "GIT_ICASE_PATHSPECS")  # fmt: skip
RESERVED = ("head", "main", "master", "workspace")
HASH = re.compile("[0-9a-f]{4,40}", re.IGNORECASE)


def git(folder: Path, *arguments: str, more: Mapping[str, str] | None = None) -> str:
    """Output of a git command, with `more` in its environment; raises `CaloraError` with git's own words."""
    done = _run(folder, *arguments, more=more)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"]
        said = next((line for line in lines if line.startswith(("fatal:", "error:"))), lines[-1])
        raise CaloraError(f"git {' '.join(arguments[:2])}", "success", said, "mend what git complains of")
    return os.fsdecode(done.stdout)


def asked(folder: Path, *arguments: str) -> str | None:
    """The same without spaces around it; None where git says no."""
    done = _run(folder, *arguments)
    return None if done.returncode else os.fsdecode(done.stdout).strip()


def _run(folder: Path, *arguments: str, more: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[bytes]:
    settings = [word for key, value in NEUTRAL.items() for word in ("-c", f"{key}={value}")]
    env = {key: value for key, value in os.environ.items() if key not in FOREIGN}
    env |= {"LC_ALL": "C", "GIT_OPTIONAL_LOCKS": "0", **(more or {})}
    return subprocess.run(["git", *settings, *arguments], cwd=folder, env=env, capture_output=True)


def commit_of(root: Path, name: str) -> str:
    """The commit that a branch, tag, experiment or hash names.

    Raises:
        CaloraError: the project is no git repository, has no commit yet, or not this one.
    """
    if asked(root, "rev-parse", "--git-dir") is None:
        fix = "git init && git add -A && git commit -m start"
        raise CaloraError(root, "a git repository: a run works in a checkout of its own", "none", fix)
    found = _commit(root, experiments(root).get(name, name))
    if found is None:
        fix = "name a branch, a tag, an experiment or a hash"
        raise CaloraError("commit", "a commit of this repository", repr(name), fix)
    return found


def _commit(root: Path, name: str) -> str | None:
    found = asked(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
    return found.splitlines()[-1] if found else None


def experiments(root: Path, commit: str | None = None) -> dict[str, str]:
    """DVC's experiments, oldest first: name -> its reference in git; of all commits, or under one."""
    under = "refs/exps" if commit is None else f"refs/exps/{commit[:2]}/{commit[2:]}"
    found = git(root, "for-each-ref", "--sort=committerdate", "--format=%(refname)", under).splitlines()
    return {reference.rsplit("/", 1)[-1]: reference for reference in found if reference.count("/") == 4}


def check_name(root: Path, name: str) -> None:
    """Raise `CaloraError` where git, DVC or the comparison would take an experiment's name for something else."""
    where, fix = f"experiment {name}", "choose another name"
    if name.lower() in RESERVED or HASH.fullmatch(name):
        raise CaloraError(where, "a name that git and DVC use for nothing else", "one that they do", fix)
    if asked(root, "check-ref-format", f"refs/exps/{name}") is None:
        raise CaloraError(where, "a name that git allows for a reference", repr(name), fix)
    if named(root, name):
        raise CaloraError(where, "a name of its own", "a branch, a tag or another reference that is called so", fix)


def named(root: Path, name: str) -> bool:
    """Whether git takes a name for one of its own references or commits."""
    return asked(root, "rev-parse", "--verify", "--quiet", "--end-of-options", name) is not None


def prefix(root: Path) -> str:
    """The project's folder within its repository: empty, or with a slash at its end."""
    return git(root, "rev-parse", "--show-prefix").rstrip("\n")


def uncommitted(root: Path) -> list[str]:
    """Changed and new files of the project that no commit holds; what runs themselves write does not count."""
    above = prefix(root)
    lines = git(root, "status", "--porcelain=v1", "--no-renames", "--untracked-files=all", "-z", "--", ".").split("\0")
    names = [line[3:].removeprefix(above) for line in lines if line]
    return [name for name in names if not name.startswith(WRITTEN_BY_RUNS)]


def refuse(changed: list[str], fix: str) -> None:
    """Raise `CaloraError` where the working tree has changes that a run would not see."""
    if changed:
        raise CaloraError("working tree", "no uncommitted changes", ", ".join(changed[:5]), fix)


def bring_changes(root: Path, inside: Path) -> None:
    """Let a checkout of HEAD have the files of the working tree, with new ones, without those that git ignores or runs write.

    They go through a tree of git's, as a commit would: a patch depends on what its user set for diff and apply.
    """
    index = Path(git(root, "rev-parse", "--path-format=absolute", "--git-path", "index").rstrip("\n"))
    ours = (".", *(f":(exclude){name}" for name in WRITTEN_BY_RUNS))
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "index"
        shutil.copy2(index, copy)  # with its time: git looks again at files that changed in the same second
        more = {"GIT_INDEX_FILE": str(copy)}
        git(root, "add", "--all", "--", *ours, more=more)
        tree = git(root, "write-tree", more=more).strip()
    git(inside, "restore", f"--source={tree}", "--staged", "--worktree", "--", *ours)


def check_can_keep(root: Path) -> None:
    """Raise `CaloraError` where DVC could save no experiment: of a submodule, beside one that is not there, by nobody."""
    if asked(root, "config", "--get", "core.worktree"):
        fix = "clone it by itself and run there; `make run` works here too"
        raise CaloraError(
            root, "a repository of its own: DVC keeps no experiment of a submodule's checkout", "a submodule", fix
        )
    absent = [name for name, folder in submodules(root).items() if not folder.exists()]
    if absent:
        raise CaloraError("submodules", "to be there", f"without {', '.join(absent)}", "git submodule update --init")
    unset = [key for key in ("user.name", "user.email") if not asked(root, "config", "--get", key)]
    if unset:
        fix = " && ".join(f'git config {key} "..."' for key in unset)
        raise CaloraError("git", "who you are: an experiment is a commit", f"no {' and no '.join(unset)}", fix)


def submodules(root: Path) -> dict[str, Path]:
    """Name of each submodule that the repository's .gitmodules has -> the repository of its own inside this one's."""
    top = Path(git(root, "rev-parse", "--show-toplevel").rstrip("\n"))
    found = asked(top, "config", "--file", ".gitmodules", "--null", "--get-regexp", r"^submodule\..*\.path$")
    names = [line.split("\n")[0].removeprefix("submodule.").removesuffix(".path") for line in (found or "").split("\0")]
    inside = Path(git(root, "rev-parse", "--path-format=absolute", "--git-common-dir").rstrip("\n")) / "modules"
    return {name: inside / name for name in names if name}


def bring_submodules(root: Path, inside: Path) -> None:
    """Check the submodules out there too, from this repository's own copies of them."""
    places = submodules(root)
    if places:
        local = ("-c", "protocol.file.allow=always")  # from this machine's own copies, and for them alone
        urls = [word for name, folder in places.items() for word in ("-c", f"submodule.{name}.url={folder}")]
        git(inside, *local, *urls, "submodule", "--quiet", "update", "--init")
