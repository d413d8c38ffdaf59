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
import yaml

from calora.common.files import fingerprint, write_json
from calora.common.tensors import write_tensors
from calora.errors import CaloraError
from stages.config import load_params
from tests.conftest import ROOT, change, make_model, make_project, toy_rows

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
    command = [sys.executable, *(() if arguments[0] == "-c" else ("-m",)), *arguments]
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


NAMES = {  # what the hub's tables call the labels of their ints
    "boolq": ["False", "True"], "cb": ["entailment", "contradiction", "neutral"], "rte": ["entailment", "not_entailment"],
    "copa": ["choice1", "choice2"], "wic": ["False", "True"], "sst2": ["negative", "positive"],
    "mnli": ["entailment", "neutral", "contradiction"], "qqp": ["not_duplicate", "duplicate"],
    "mrpc": ["not_equivalent", "equivalent"], "qnli": ["entailment", "not_entailment"],
}  # fmt: skip
COLUMNS = {  # besides label and idx
    "boolq": ["question", "passage"], "cb": ["premise", "hypothesis"], "rte": ["premise", "hypothesis"],
    "copa": ["premise", "choice1", "choice2", "question"], "wic": ["word", "sentence1", "sentence2"], "sst2": ["sentence"],
    "mnli": ["premise", "hypothesis"], "qqp": ["question1", "question2"], "mrpc": ["sentence1", "sentence2"],
    "qnli": ["question", "sentence"],
}  # fmt: skip
EACH = """
import sys
from stages import download
from stages.config import load_params
for name in sys.argv[1:]:
    download.main(load_params(), name)
"""


def table(task, split, count):
    """A table as the hub has it: labels are ints with names, and -1 in a test set."""
    from datasets import ClassLabel, Dataset, Features, Value

    if task == "squad":
        return Dataset.from_list([
            {"id": f"{split}{n}", "title": "T", "context": f"{split} {n}", "question": "Q?", "answers": {"text": [f"{n}", "x"], "answer_start": [1, 2]}}
            for n in range(count)
        ])  # fmt: skip
    names = NAMES[task]
    rows = [
        {**{column: f"{column} {split} {n}" for column in COLUMNS[task]}, "idx": n, "label": -1 if split == "test" else n % len(names)}
        for n in range(count)
    ]  # fmt: skip
    kinds = {**dict.fromkeys(COLUMNS[task], Value("string")), "idx": Value("int32"), "label": ClassLabel(names=names)}
    return Dataset.from_list(rows, Features(kinds))


def test_the_papers_tasks_of_the_hub(hub, tmp_path):
    """Repositories with the layout of the pinned ones: a folder of parquet files a subset, named in the card."""
    root, address = hub
    folder, cards = make_project(tmp_path / "p"), {}
    sets = yaml.safe_load((ROOT / "stages/tasks.yaml").read_text())
    for task, entry in sets.items():
        place, subset = entry["hub"], entry["hub"]["subset"] or "plain_text"
        ends = ("_matched", "_mismatched") if task == "mnli" else ("",)
        splits = [
            "train",
            *(f"validation{end}" for end in ends),
            *([] if task == "squad" else [f"test{end}" for end in ends]),
        ]
        below = root / "datasets" / place["repo"] / subset
        below.mkdir(parents=True)
        for split in splits:
            table(task, split, 40 if split == "train" else 12).to_parquet(below / f"{split}-00000-of-00001.parquet")
        files = [{"split": split, "path": f"{subset}/{split}-*"} for split in splits]
        cards.setdefault(place["repo"], []).append({"config_name": subset, "data_files": files})
        for key in ("hub", "files"):
            entry.pop(key, None)
    for repo, configs in cards.items():
        (root / "datasets" / repo / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
    change(folder, "data.sets", {task: {"like": task, "revision": COMMIT} for task in sets})
    change(folder, "tasks", list(sets))
    result = stage(folder, address, "-c", EACH, *sets)
    assert result.returncode == 0, result.stderr
    for task in sets:
        rows = [json.loads(line) for line in (folder / f"data/{task}/test.jsonl").read_text().splitlines()]
        assert len(rows) == 12
        if task == "squad":
            assert all(row["answer"] == [row["context"].split()[1], "x"] for row in rows)
            continue
        for row in rows:
            column = next(iter(COLUMNS[task]))
            number = int(row[column].split()[-1])
            name = NAMES[task][number % len(NAMES[task])]
            assert any("validation" in str(value) for value in row.values())
            assert row["label"] == place_of(sets[task]["labels"], name, number % len(NAMES[task])), task


def place_of(labels, name, number):
    """Where `answers` has a label that the hub calls so; of plain numbers their own place."""
    spelled = [[str(one) for one in label] if isinstance(label, list) else [str(label)] for label in labels]
    return next(place for wanted in (name, str(number)) for place, names in enumerate(spelled) if wanted in names)


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
