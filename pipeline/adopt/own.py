"""Put files into own/: linked or copied, all of them or none."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import TracebackType

from calora.common.files import sha256
from calora.errors import CaloraError
from stages.files import OWN


class Own:
    """Places files; leaving its block by an error, or without `keep`, takes back every one of them."""

    def __init__(self, copy: bool) -> None:
        self._copy = copy
        self._kept = False
        self._made: list[Path] = []
        self._replaced: list[tuple[Path, Path]] = []  # a link, and what it pointed to
        self.placed: list[Path] = []

    def __enter__(self) -> Own:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._kept:
            return
        for path in reversed(self._made):
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        for path, target in self._replaced:
            _link(target, path)

    def keep(self) -> None:
        """What was placed stays."""
        self._kept = True

    def file(self, source: Path, folder: Path, copy: bool = False) -> Path:
        """The path inside own/ of a file: its own where it is there already, else a link (or a copy) in `folder`.

        Raises:
            CaloraError: another file has that name there.
        """
        whole = source.absolute()
        if whole.is_relative_to(OWN.absolute()) and not _behind_link(whole):
            return whole.relative_to(Path.cwd())
        target, origin = folder / source.name, source.resolve()
        if target.is_symlink():
            if target.resolve() == origin:
                return target
            self._replaced.append((target, Path(os.readlink(target))))
            target.unlink()
        elif target.exists():
            if sha256(target) == sha256(origin):
                return target
            fix = "give another --name, or remove that file"
            raise CaloraError(target, f"no other file than {source}", "a file of other content", fix)
        self._folder(folder)
        self._made.append(target)
        if copy or self._copy:
            scratch = target.with_name(f".{target.name}.partial")
            shutil.copyfile(origin, scratch)
            scratch.replace(target)
        else:
            _link(origin, target)
        self.placed.append(target)
        return target

    def _folder(self, folder: Path) -> None:
        missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
        for parent in reversed(missing):
            parent.mkdir()
            self._made.append(parent)


def _behind_link(path: Path) -> bool:
    return any(
        parent.is_symlink()
        for parent in path.parents
        if parent.is_relative_to(OWN.absolute()) and parent != OWN.absolute()
    )


def _link(target: Path, path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)
