"""Benchmarks are run by hand and seldom: what can be checked without their models is checked here."""

import base64
import json

import numpy as np
import pytest
import torch

from benchmarks import gpu, recipes, references, supervision, walks
from calora.compression.walk import Calibration
from calora.models.loading import load_model
from stages.config import load_params
from tests.conftest import ROOT, make_model
from tests.test_compression import EXPERTS, INT8, PRUNE


def test_no_calibration_text_is_held_back(tmp_path, monkeypatch, llama):
    """The first texts that are in none that a compression looked at: neither raw nor in a prompt."""
    files = {
        "c": ["a film", "Review: the plot Sentiment:"],
        "m": ["a film", "was good", "the plot", "was bad", "is a film"],
        "n": ["is great"],
        "t": ["was bad"],
    }
    for name, texts in files.items():
        (tmp_path / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    monkeypatch.setattr(references, "BASE", llama)
    monkeypatch.setattr(references, "CALIBRATION", str(tmp_path / "c"))
    monkeypatch.setattr(references, "TUNING", str(tmp_path / "t"))
    monkeypatch.setattr(references, "HELD_BACK", {str(tmp_path / "m"): 2, str(tmp_path / "n"): 1})
    assert len(references.calibration()) == 2
    tokenizer = references.AutoTokenizer.from_pretrained(llama)
    assert references.held_back() == [tokenizer(text).input_ids for text in ("was good", "is a film", "is great")]
    model = load_model(llama, torch.float32)
    assert references.perplexity(model) > 1


@pytest.mark.parametrize("walk_a_step", [False, True])
def test_both_ways_to_walk_make_a_model_that_computes(tmp_path, monkeypatch, toy, walk_a_step):
    base = make_model("llama", tmp_path / "base", hidden=64, inner=64)
    monkeypatch.setattr(walks, "BASE", base)
    recipe = [{"moefy": {**EXPERTS, "router": "analytic"}}, PRUNE, INT8]
    model = walks.compressed([[step] for step in recipe] if walk_a_step else [recipe], Calibration(toy[2]))
    assert bool(model(torch.tensor([[3, 5, 9]])).logits.isfinite().all())
    assert bool(((model.model.layers[0].mlp.up_proj.weight.view(-1, 4) != 0).sum(-1) <= 2).all())


def test_results_of_several_seeds_and_tasks_come_together():
    def stored(right, size):
        bits = np.packbits([1] * right + [0] * (100 - right))
        return {
            "items": 100,
            "hits": base64.b64encode(bits.tobytes()).decode(),
            "bytes_on_disk": size,
            "adapter_bytes": 5_000_000,
        }

    runs = {
        seed: {task: {"": {"llm_lora": stored(90, 276e6)}, "q3": {"clm_calora": stored(right, 85e6), "clm_lora": stored(70, 85e6)}}
               for task in recipes.TASKS}
        for seed, right in (("0", 80), ("1", 86))
    }  # fmt: skip
    runs["2"] = {"movies": runs["0"]["movies"]}  # a seed that was not run on every task
    found = recipes.Results({"runs": runs, "sizes": {"q3": {"bytes": 71_000_000, "share": 0.26}}})
    assert found.mean(("q3", "clm_calora")).value == pytest.approx((3 * 0.83 + 0.82) / 4)
    gain, seeds = found.difference(("q3", "clm_calora"), ("", "llm_lora"))
    assert gain.value == pytest.approx(-0.07) and seeds == ["0", "1"] and gain.ci[0] < -0.07 < gain.ci[1]
    assert found.mean(("q3", "clm_calora_free")) is None and found.difference(("q3", "clm"), ("", "llm")) is None
    (row,) = recipes.means_table(found).rows
    assert row[0] == "q3" and row[-1] == "0, 1" and row[-3].startswith("+0.130") and row[2] == ""
    low, high = recipes.front_table(found).rows
    assert low == ["80 to 90", "CA-LoRA on q3: 0.828 (85.0 MB)", ""]
    assert high == ["160 to 170", "", "CA-LoRA on q3: 0.828 (160.0 MB)"]
    assert len(recipes.tasks_table(found).rows) == 3
    teacher, labels = supervision.supervision_table(found).rows
    assert teacher[:2] == ["uncompressed", "the teacher, on the uncompressed base"] and teacher[-2:] == ["", "0, 1, 2"]
    assert labels[:2] == ["q3", "labels, unlabelled texts"] and labels[6] == "0.828" and labels[-3] == ""
    assert labels[-2].startswith("-0.070 [")
    alone = recipes.Results({"runs": {"0": {"movies": runs["0"]["movies"]}}, "sizes": {}})
    assert alone.tasks == ["movies"] and alone.mean(("q3", "clm_calora")).value == pytest.approx(0.8)


def test_every_line_of_the_table_of_supervision_is_a_method():
    methods = load_params(ROOT / "params.yaml").methods
    assert set(supervision.ROWS) <= methods.keys()
    page = (ROOT / supervision.PAGE).read_text(encoding="utf-8")
    marks = [recipes.MARKS.format(f"{end}: {supervision.NAME}", "benchmarks.supervision") for end in ("start", "end")]
    assert all(page.count(mark) == 1 for mark in marks)
    assert recipes.between("a " + "x".join(marks) + " b", supervision.NAME, "t", "benchmarks.supervision").split() == (
        f"a {marks[0]} t {marks[1]} b".split()
    )


def test_the_benchmark_of_gpus_runs_on_a_cpu(tmp_path, monkeypatch):
    """All rows and all parities, on a tiny model."""
    monkeypatch.setattr("sys.argv", ["gpu", "--tiny", "--out", str(tmp_path / "gpu.md")])
    gpu.main()
    page = (tmp_path / "gpu.md").read_text()
    lines = [line.split("|") for line in page.splitlines()]
    for name, *_ in gpu.rows():
        (cells,) = [line for line in lines if len(line) == 8 and line[1].strip() == name]
        assert float(cells[2].replace(",", "")) > 0 and float(cells[4].replace(",", "")) > 0, cells
    count = len(gpu.RECIPES) * 5 + 1
    assert f"{count} of {count} within bounds." in page


def test_a_row_that_fails_leaves_the_others(tmp_path, monkeypatch):
    def fails(root):
        raise RuntimeError("no kernel image is available\nfor this device")

    monkeypatch.setattr(gpu, "rows", lambda: [("one", fails, False), ("two", fails, False)])
    monkeypatch.setattr(gpu, "RECIPES", {})
    page = gpu.report(gpu.TINY, gpu.Work(1, 4, 1, 1), 1e9)
    assert page.count("failed: RuntimeError: no kernel image is available |") == 2
    assert "| one | not measured: the time was over" in gpu.report(gpu.TINY, gpu.Work(1, 4, 1, 1), 0.0)
