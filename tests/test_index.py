"""Package files, from places of our own that stand for PyPI: nothing in them is run, only the wanted hash is taken."""

import hashlib
import io
import json
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from calora.errors import CaloraError
from stages.sources import fetch, read_member

SDIST = "Tiny_Corpus-1.0.tar.gz"


def sdist():
    """A source distribution whose setup script, if it is run, leaves a file."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, text in (
            ("setup.py", b"open('/tmp/ran', 'w')\nraise SystemExit('setup.py was run')"),
            ("texts.txt", b"hello"),
        ):
            info = tarfile.TarInfo(f"tiny_corpus-1.0/{name}")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text))
    return stream.getvalue()


CONTENT = sdist()
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Index(BaseHTTPRequestHandler):
    """`/json` and `/html` are simple indexes (PEP 691 and 503) of one package."""

    content = CONTENT

    def log_message(self, *args):
        pass

    def do_GET(self):
        files = {"tiny_corpus-0.9.tar.gz": "1" * 64, SDIST: DIGEST}
        if self.path.endswith(SDIST):
            return self.send("application/octet-stream", self.content)
        if self.path == "/json/tiny-corpus/":
            listed = [{"filename": n, "url": f"../../files/{n}", "hashes": {"sha256": d}} for n, d in files.items()]
            return self.send("application/vnd.pypi.simple.v1+json", json.dumps({"files": listed}).encode())
        if self.path == "/html/tiny-corpus/":
            anchors = "".join(f'<a href="../../files/{n}#sha256={d}">{n}</a>' for n, d in files.items())
            return self.send("text/html", anchors.encode())
        self.send_error(404)

    def send(self, kind, content):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def pip(tmp_path, monkeypatch):
    """Sets pip's places for this test alone: pip(no_index="1", ...)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("stages.sources.CACHE", Path("cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    for name in ("INDEX_URL", "EXTRA_INDEX_URL", "FIND_LINKS", "NO_INDEX"):
        monkeypatch.delenv(f"PIP_{name}", raising=False)
    monkeypatch.setenv("PIP_RETRIES", "0")
    return lambda **places: [monkeypatch.setenv(f"PIP_{key.upper()}", str(value)) for key, value in places.items()]


@pytest.fixture
def address():
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Here", (Index,), {}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", server.RequestHandlerClass
    server.shutdown()


def test_settings_that_pip_cannot_read(pip, tmp_path, monkeypatch):
    (tmp_path / "pip.conf").write_text("no section")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    with pytest.raises(CaloraError, match="pip config list"):
        fetch("tiny", "1.0", DIGEST)


def cached():
    return [path.name for path in Path("cache").glob("*")]


@pytest.mark.parametrize("kind", ["json", "html"])
def test_an_index(pip, address, kind):
    pip(index_url=f"{address[0]}/{kind}")
    file = fetch("tiny.corpus", "1.0", DIGEST)
    assert read_member(file, "texts.txt") == b"hello" and cached() == [SDIST]
    pip(index_url="http://127.0.0.1:9")
    assert fetch("tiny.corpus", "1.0", DIGEST) == file  # from the cache


@pytest.mark.parametrize("setting", ["find_links", "extra_index_url"])
def test_places_of_this_machine(pip, tmp_path, setting):
    folder = tmp_path / ("links" if setting == "find_links" else "index/tiny-corpus")
    folder.mkdir(parents=True)
    (folder / SDIST).write_bytes(CONTENT)
    if setting == "find_links":
        pip(find_links=folder, no_index="1")
    else:
        (folder / "index.html").write_text(f'<a href="{SDIST}#sha256={DIGEST}">{SDIST}</a>')
        pip(index_url="http://127.0.0.1:9", extra_index_url=folder.parent.as_uri())
    assert fetch("tiny_corpus", "1.0", DIGEST).read_bytes() == CONTENT


def test_a_wrong_hash_an_unknown_version_and_name(pip, address):
    pip(index_url=f"{address[0]}/json")
    with pytest.raises(CaloraError, match=f"a file of SHA-256 0000.*{DIGEST}"):
        fetch("tiny-corpus", "1.0", "0" * 64)
    with pytest.raises(CaloraError, match=r"a published version, found 0\.9, 1\.0"):
        fetch("tiny-corpus", "3.0", DIGEST)
    with pytest.raises(CaloraError, match="no package of that name"):
        fetch("tiny-corps", "1.0", DIGEST)
    address[1].content = CONTENT[:-1] + b"x"  # the place names the right hash and sends another file
    with pytest.raises(CaloraError, match="SHA-256"):
        fetch("tiny-corpus", "1.0", DIGEST)
    assert not cached()
