"""Bad input: one clear line, exit code 1, nothing half-written."""

import io
import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from calora.common.files import whole_directory, write_json
from calora.common.tensors import read_tensors, write_tensors
from calora.errors import CaloraError
from calora.models.loading import load_model, load_tokenizer
from calora.models.tasks import read_rows
from stages import download
from stages.common import _full_disk
from stages.config import load_params
from stages.sources import fetch, read_member
from tests.conftest import TASK, change, make_project


@pytest.fixture
def folder(tmp_path, monkeypatch):
    project = make_project(tmp_path / "p")
    monkeypatch.chdir(project)
    return project


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("methods.calora.loss.alpha", -1, r"methods\.calora\.loss\.alpha"),
        ("methods.calora.loss.alpha", "high", r"methods\.calora\.loss\.alpha"),
        ("evaluate.drawn", 1, "no such key"),
        ("methods.calora.loss.alfa", 1, r"methods\.calora\.loss\.alfa"),
        ("methods.calora.start.bypass.rank", 0, r"methods\.calora\.start\.bypass\.rank"),
        ("methods.calora.start.bypass.rank", 3, "even"),
        ("methods.calora.start.bypass.rank", None, r"methods\.calora\.start\.bypass: either a rank or a budget"),
        ("methods.calora.start.bypass.budget", 2, r"either a rank or a budget, and null for the other \(4 and 2\.0\)"),
        ("methods.calora.start.bypass.budget", 0, r"methods\.calora\.start\.bypass\.budget"),
        (
            "methods.paper.start.bypass",
            {"start": "zero", "rank": None, "budget": 2},
            "a budget goes with `start: weighted",
        ),
        ("methods.paper.like", "nobody", r"methods\.paper\.like names 'nobody'"),
        ("methods.calora.like", "paper", "leads back to itself"),
        ("methods.clm_lora.start.budget", "nobody", r"methods\.clm_lora\.start\.budget names 'nobody'"),
        ("methods.clm_lora.start.budget", "clm_lora", "has a budget itself"),
        ("methods.clm_lora.start.lora", "inherited", "budget goes with"),
        ("methods.clm_lora.start.scales", True, "budget goes with"),
        ("methods.clm_lora.start.budget", "calora_scales", "no LoRA counts as many"),
        ("methods.calora_scales.start.scales", "all", r"methods\.calora_scales\.start\.scales"),
        ("methods.base", {"like": "clm"}, "models/base"),
        ("compare", ["calora", "nobody"], "nobody"),
        ("recipes", ["q9"], "q9"),
        ("tasks", ["toys"], "toys"),
        ("tasks", [], "tasks"),
        ("export.recipes", ["q3"], r"export\.recipes names 'q3'; known: q8_up"),
        ("export.kinds", ["onnx"], r"export\.kinds"),
        ("export.requantise", "Q2_K", r"export\.requantise"),
        ("methods.export", {"like": "clm"}, "models/export"),
        ("train.warmup", 6, "below steps"),
        ("seed", 1.5, "seed"),
    ],
)
def test_a_wrong_parameter_is_named(folder, key, value, said):
    change(folder, key, value)
    with pytest.raises(CaloraError, match=said) as caught:
        load_params()
    assert "Fix:" in str(caught.value) and "\n" not in str(caught.value)


def test_two_stages_of_one_name_are_refused(folder):
    change(folder, "compress.q8-a", [])
    change(folder, "methods.b", {"like": "clm"})
    change(folder, "methods.a-b", {"like": "clm"})
    change(folder, "recipes", ["q8", "q8-a"])
    change(folder, "compare", ["b", "a-b"])
    with pytest.raises(CaloraError, match=r"two stages 'toy-q8-a-b'"):
        load_params()


def test_what_is_exported_has_to_be_made(folder):
    change(folder, "export.recipes", ["q8_up"])
    load_params()
    change(folder, "evaluate.ours", "paper")
    with pytest.raises(CaloraError, match=r"export\.recipes needs the adapters of evaluate\.ours, 'paper', in compare"):
        load_params()


def test_a_missing_key_is_named(folder):
    text = (folder / "params.yaml").read_text()
    (folder / "params.yaml").write_text(text.replace("      kl: 1.0\n", "", 1))
    with pytest.raises(CaloraError, match=r"methods\.calora\.loss\.kl: Field required"):
        load_params()


def test_a_stage_ends_with_one_line_and_no_traceback(folder):
    change(folder, "seed", -1)
    result = subprocess.run([sys.executable, "-m", "stages.download", "toy"], capture_output=True, text=True)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr and result.stderr.count("error:") == 1
    assert not (folder / "data").exists()


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "a film", "label": 7}, "a label among 0, 1"),
        ({"text": "", "label": 1}, "text in column 'text'"),
        ({"label": 1}, "column"),
    ],
)
def test_a_bad_row_is_named(folder, row, said):
    (folder / "own/train.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(CaloraError, match=said):
        download.main(load_params(), "toy")
    assert not (folder / "data").exists() or not list((folder / "data").iterdir())


def test_an_empty_split_is_refused(folder, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(CaloraError, match="empty split"):
        read_rows(tmp_path / "empty.jsonl", "")


def test_targets_that_match_nothing(folder):
    from calora.adapters.lora import check_targets

    model = load_model(folder / "sources/base", torch.bfloat16)
    with pytest.raises(CaloraError, match=r"q_proj.*found \['c_attn'\]"):
        check_targets(model, ["c_attn"], 4)
    with pytest.raises(CaloraError, match=r"rank: expected 1 to 16, the width of .*k_proj, found 17"):
        check_targets(model, ["q_proj", "k_proj"], 17)


@pytest.mark.parametrize("answers", [("good film", "good film"), ("good", "good film")])
def test_answers_that_cannot_be_told_apart(folder, answers):
    tokenizer = load_tokenizer(folder / "sources/base")
    with pytest.raises(CaloraError, match="none of which begins with another"):
        type(TASK)("t", "{text}", answers, 8, 2).answer_token_ids(tokenizer)
    assert type(TASK)("t", "{text}", ("good film", "good plot"), 8, 2).answer_token_ids(tokenizer) is None


def test_a_base_without_tokenizer(folder):
    (folder / "sources/base/tokenizer.json").unlink()
    from stages import base

    with pytest.raises(CaloraError, match="tokenizer"):
        base.main(load_params())
    assert not (folder / "models/base").exists()


def test_pickles_are_not_read(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(CaloraError, match="only pickles"):
        read_tensors(tmp_path / "model.safetensors", "")


def test_members_cannot_climb_out(tmp_path):
    for name in ("../evil.txt", "/evil.txt", "a/../../evil.txt"):
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            archive.writestr(name, "x")
        with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
        for file in ("a.zip", "a.tar.gz"):
            with pytest.raises(CaloraError, match="inside their own folder"):
                read_member(tmp_path / file, name)


def test_no_network_and_a_wrong_hash(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("stages.sources.CACHE", Path("cache"))
    # A local index of one file stands for PyPI; then an address where nothing listens.
    wheel = tmp_path / "index/tiny-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        archive.writestr("tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    with pytest.raises(CaloraError, match="SHA-256 0000"):
        fetch("tiny", "1.0", "0" * 64)
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(CaloraError, match="network"):
        fetch("tiny", "1.0", "0" * 64)
    assert not [p for p in Path("cache").glob("*") if p.is_file()]


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise SafetensorError("I/O error: No space left on device (os error 28)")  # as safetensors says it

    monkeypatch.setattr("calora.common.tensors.save_file", full)
    with pytest.raises(OSError) as caught, whole_directory(tmp_path / "out") as scratch:
        write_json(scratch / "a.json", {})
        write_tensors(scratch / "b.safetensors", {"a": torch.ones(1)})
    assert "full disk" in _full_disk(caught.value)
    assert not list(tmp_path.iterdir())
