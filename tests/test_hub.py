"""Hub sources, against a small server of our own that answers as the hub does (HF_ENDPOINT)."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlparse

import pytest
import torch

from calora.common.files import fingerprint, write_json
from calora.common.tensors import write_tensors
from calora.errors import CaloraError
from stages.config import load_params
from tests.conftest import change, make_model, make_project, toy_rows

COMMIT = "0123456789abcdef0123456789abcdef01234567"
DATA = {
    "source": "hub", "repo": "us/toy", "revision": COMMIT, "subset": None, "train": "train", "validation": None,
    "test": "test", "label": "label", "labels": [0, 1], "prompt": "Review: {text} Sentiment:",
    "answers": ["negative", "positive"], "max_tokens": 32, "max_new_tokens": 3,
}  # fmt: skip


class Hub(BaseHTTPRequestHandler):
    """`models/<owner>/<name>` and `datasets/<owner>/<name>` below `root`, each with the one commit COMMIT."""

    root: Path

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.answer(body=True)

    def do_HEAD(self):
        self.answer(body=False)

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        folder = self.root.joinpath(*urlparse(self.path).path.split("/")[2:5])
        self.send([entry for entry in entries(folder) if entry["path"] in asked["paths"]])

    def answer(self, body):
        parts = urlparse(self.path).path.strip("/").split("/")
        if parts[0] == "api":
            folder = self.root.joinpath(*parts[1:4])
            if not folder.is_dir() or COMMIT not in (parts[5:6] or [COMMIT]):
                return self.send({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            if parts[4:5] == ["tree"]:
                below = "/".join(parts[6:])
                return self.send([e for e in entries(folder) if e["path"].startswith(below)])
            files = [{"rfilename": e["path"]} for e in entries(folder) if e["type"] == "file"]
            return self.send({"id": "/".join(parts[2:4]), "sha": COMMIT, "siblings": files, "tags": []})
        kind = "datasets" if parts[0] == "datasets" else "models"
        owner, name, _, _, *path = parts if kind == "models" else parts[1:]
        file = self.root.joinpath(kind, owner, name, *path)
        if not file.is_file():
            return self.send({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        content = file.read_bytes()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        return self.send(content, 200, headers, body)

    def send(self, content, code=200, headers=None, body=True):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


def entries(folder):
    """What the hub's tree lists."""
    return [
        {
            "type": "file" if path.is_file() else "directory",
            "path": path.relative_to(folder).as_posix(),
            "size": path.stat().st_size,
            "oid": hashlib.sha256(path.as_posix().encode()).hexdigest()[:40],
        }
        for path in sorted(folder.rglob("*"))
    ]


@pytest.fixture
def hub(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Here", (Hub,), {"root": tmp_path / "hub"}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield tmp_path / "hub", f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def stage(folder, address, *arguments):
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(folder / "hf")}
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_a_model_of_the_hub(hub, tmp_path):
    root, address = hub
    repo = make_model("llama", root / "models/us/tiny")
    (repo / "pytorch_model.bin").write_bytes(b"\x80\x04")  # must not be fetched
    folder = make_project(tmp_path / "p")
    source = {"source": "hub", "repo": "us/tiny", "revision": COMMIT, "sha256": fingerprint(repo)}
    change(folder, "base", source)
    result = stage(folder, address, "stages.base")
    assert result.returncode == 0, result.stderr
    assert fingerprint(folder / "models/base") == fingerprint(repo)
    assert not list((folder / "models/base").glob("*.bin"))

    for key, value, said in (
        ("sha256", "0" * 64, f"found {fingerprint(repo)}"),
        ("repo", "us/none", "hub repository us/none"),
    ):
        change(folder, "base", {**source, key: value})
        result = stage(folder, address, "stages.base")
        assert result.returncode == 1 and said in result.stderr and "Traceback" not in result.stderr, result.stderr
        assert fingerprint(folder / "models/base") == fingerprint(repo)  # the finished one is still there


def test_a_branch_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.chdir(make_project(tmp_path / "p"))
    change(Path(), "base", {"source": "hub", "repo": "us/tiny", "revision": "main", "sha256": "0" * 64})
    with pytest.raises(CaloraError, match=r"base\.revision"):
        load_params()


def test_a_dataset_of_the_hub(hub, tmp_path):
    root, address = hub
    (root / "datasets/us/toy/data").mkdir(parents=True)
    for split, count in (("train", 40), ("test", 16)):
        lines = "".join(json.dumps(row) + "\n" for row in toy_rows(count, len(split)))
        (root / f"datasets/us/toy/data/{split}.jsonl").write_text(lines)
    folder = make_project(tmp_path / "p")
    change(folder, "data.sets", {"toy": DATA})
    result = stage(folder, address, "stages.download", "toy")
    assert result.returncode == 0, result.stderr
    rows = {s: (folder / f"data/toy/{s}.jsonl").read_text().splitlines() for s in ("train", "validation", "test")}
    assert len(rows["test"]) == 16 and len(rows["train"]) == 24 and rows["validation"]

    change(folder, "data.sets", {"toy": {**DATA, "test": "exam"}})
    result = stage(folder, address, "stages.download", "toy")
    assert result.returncode == 1 and "us/toy, split exam" in result.stderr and "Traceback" not in result.stderr


def test_an_adapter_of_the_hub(hub, tmp_path):
    root, address = hub
    repo = root / "models/us/lora/second"
    repo.mkdir(parents=True)
    write_json(repo / "adapter_config.json", {"peft_type": "LORA", "r": 2})
    write_tensors(repo / "adapter_model.safetensors", {"a": torch.ones(2, 2)})
    (repo / "optimizer.pt").write_bytes(b"\x80\x04")
    folder = make_project(tmp_path / "p")
    source = {"repo": "us/lora", "revision": COMMIT, "folder": "second"}
    change(folder, "teacher.adapters", {"toy": source})
    result = stage(folder, address, "stages.download", "toy")
    assert result.returncode == 0, result.stderr
    assert fingerprint(folder / "models/brought/toy") == fingerprint(repo)
    assert not list((folder / "hf").rglob("*.pt"))
    change(folder, "teacher.adapters", {"toy": {"repo": "us/lora", "revision": COMMIT}})
    result = stage(folder, address, "stages.download", "toy")
    assert result.returncode == 1 and "the configuration of an adapter" in result.stderr, result.stderr
    change(folder, "teacher.adapters", {"toy": {**source, "revision": "main"}})
    result = stage(folder, address, "stages.download", "toy")
    assert result.returncode == 1 and "params.yaml: teacher.adapters.toy.revision" in result.stderr


def test_a_network_that_gives_no_answer_is_told_from_a_mistake(tmp_path):
    """A run tries the one again, and not the other (`pipeline.graph.NO_ANSWER`)."""
    folder = make_project(tmp_path / "p")
    change(folder, "data.sets", {"toy": DATA})
    result = stage(folder, "http://127.0.0.1:9", "stages.download", "toy")
    assert result.returncode == 1 and "expected an answer, " in result.stderr, result.stderr
