"""The files of a package, from the places that pip is set to, without pip: for a source distribution it runs code.

The simple index is PEP 503 (HTML) and PEP 691 (JSON).
"""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urldefrag, urljoin, urlsplit
from urllib.request import url2pathname

import requests
from packaging.utils import (
    InvalidSdistFilename,
    InvalidWheelFilename,
    canonicalize_name,
    parse_sdist_filename,
    parse_wheel_filename,
)

from calora.common.progress import progress
from calora.errors import CaloraError

MEGABYTE = 10**6
JSON = "application/vnd.pypi.simple.v1+json"


@dataclass(frozen=True)
class Link:
    """A file that a place offers; `sha256` is empty where the place does not name it."""

    address: str
    sha256: str = ""

    @property
    def name(self) -> str:
        """The file's name."""
        return PurePosixPath(unquote(urlsplit(self.address).path)).name

    def version_of(self, package: str) -> str | None:
        """The version of `package` that it is, by its name; None if it is no wheel or source distribution of it."""
        try:
            wheel = self.name.endswith(".whl")
            name, version = parse_wheel_filename(self.name)[:2] if wheel else parse_sdist_filename(self.name)
        except (InvalidWheelFilename, InvalidSdistFilename):
            return None
        return str(version) if name == canonicalize_name(package) else None


class Pip:
    """pip's settings, as `pip config list` has them: the places, certificates, proxy, patience.

    Raises:
        CaloraError: pip cannot read them.
    """

    def __init__(self) -> None:
        command = [sys.executable, "-m", "pip", "config", "list", "--disable-pip-version-check"]
        answer = subprocess.run(command, capture_output=True, text=True)
        if answer.returncode:
            found = (answer.stderr.strip().splitlines() or ["no answer"])[-1]
            raise CaloraError("pip config list", "pip's settings", found[:200], "mend pip's configuration")
        lines = answer.stdout.splitlines()
        self.settings: dict[str, str] = {}
        for section in ("global.", "download.", ":env:."):  # a later one goes before, as in pip
            for line in lines:
                key, _, value = line.removeprefix(section).partition("=")
                if line.startswith(section):
                    self.settings[key] = ast.literal_eval(value)
        self.session = requests.Session()
        self.session.verify = self.settings.get("cert", True)
        self.session.cert = self.settings.get("client-cert")
        if proxy := self.settings.get("proxy"):
            self.session.proxies = {"http": proxy, "https": proxy}
        for scheme in ("http://", "https://"):
            retries = int(self.settings.get("retries", 5))
            self.session.mount(scheme, requests.adapters.HTTPAdapter(max_retries=retries))

    def pages(self, package: str) -> list[str]:
        """Addresses of what lists the package's files, folders of this machine first."""
        pages = self.settings.get("find-links", "").split()
        if self.settings.get("no-index", "0").lower() not in ("1", "true", "yes", "on"):
            indexes = [self.settings.get("index-url", "https://pypi.org/simple")]
            indexes += self.settings.get("extra-index-url", "").split()
            pages += [f"{index.rstrip('/')}/{canonicalize_name(package)}/" for index in indexes]
        return sorted(map(_address, pages), key=lambda page: not page.startswith("file:"))

    def links(self, page: str) -> list[Link]:
        """The files that a page lists; none where the index does not know the package.

        Raises:
            requests.RequestException: it does not answer.
        """
        if page.startswith("file:"):
            path = _path(page)
            if path.is_dir() and not (path / "index.html").exists():
                return [Link(file.as_uri()) for file in sorted(path.iterdir()) if file.is_file()]
            path = path / "index.html" if path.is_dir() else path
            return _anchors(path.read_text(encoding="utf-8"), path.as_uri()) if path.exists() else []
        answer = self._get(page)
        if answer.status_code == 404:
            return []
        answer.raise_for_status()
        if "json" not in answer.headers.get("Content-Type", ""):
            return _anchors(answer.text, answer.url)
        files = answer.json()["files"]
        return [Link(urljoin(answer.url, file["url"]), file["hashes"].get("sha256", "")) for file in files]

    def save(self, link: Link, target: Path) -> None:
        """Write a file to `target`.

        Raises:
            requests.RequestException: its place does not answer.
        """
        if link.address.startswith("file:"):
            target.write_bytes(_path(link.address).read_bytes())
            return
        with self._get(link.address) as answer, target.open("wb") as file:
            answer.raise_for_status()
            total = int(answer.headers.get("Content-Length", 0)) // MEGABYTE or None
            for part in progress(answer.iter_content(MEGABYTE), link.name, "MB", total):
                file.write(part)

    def _get(self, address: str) -> requests.Response:
        patience = float(self.settings.get("timeout") or self.settings.get("default-timeout") or 15)
        headers = {"Accept": f"{JSON}, text/html;q=0.5, */*;q=0.1", "Accept-Encoding": "identity"}
        return self.session.get(address, headers=headers, timeout=patience, stream=True)


class _Anchors(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if tag == "a" and name == "href" and value]


def _anchors(text: str, page: str) -> list[Link]:
    anchors = _Anchors()
    anchors.feed(text)
    parts = [urldefrag(urljoin(page, found)) for found in anchors.found]
    return [Link(address, note[7:] if note.startswith("sha256=") else "") for address, note in parts]


def _address(place: str) -> str:
    """A place of pip's settings as an address: a path of this machine becomes a file: one."""
    known = urlsplit(place).scheme in ("http", "https", "file")
    return place if known else Path(place).expanduser().absolute().as_uri()


def _path(address: str) -> Path:
    return Path(url2pathname(urlsplit(address).path))
